"""What trains of the base in float32 while the model computes in half precision."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_INSIDE = re.compile(r"parametrizations\.(\w+)\.original$")


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self.dtype)


def keep_master(model: nn.Module, name: str) -> None:
    """Let the parameter ``name`` train, with its values held in float32.

    A half-precision parameter loses small updates. Its module goes on seeing it in its own dtype,
    cast anew in each forward pass; modules that share it go on sharing it.
    """
    owner, _, end = name.rpartition(".")
    module = model.get_submodule(owner)
    if parametrize.is_parametrized(module, end):
        return  # a name of one that is shared
    parameter = getattr(module, end)
    if parameter.dtype == torch.float32:
        parameter.requires_grad_(True)
        return
    master = nn.Parameter(parameter.detach().float())
    sharing = [
        (other, key)
        for other in model.modules()
        for key, value in other.named_parameters(recurse=False)
        if value is parameter
    ]
    for other, key in sharing:
        setattr(other, key, master)
        parametrize.register_parametrization(other, key, _Cast(parameter.dtype), unsafe=True)


def train_whole(model: nn.Module, name: str, keep_dtype: bool) -> None:
    """Train a module in float32; its input is cast on the way in.

    The output stays float32 for a head (``keep_dtype``) and is cast back elsewhere, so that the
    layers after it see what they saw before. Modules that share the parameter (tied embeddings)
    get the same casts.
    """
    module = model.get_submodule(name)
    before = next(module.parameters()).dtype
    module.to(torch.float32).requires_grad_(True)
    if before == torch.float32:
        return
    shared = {id(p) for p in module.parameters()}
    for other in model.modules():
        tied = any(id(p) in shared for p in other.parameters(recurse=False))
        if other is module or (tied and other not in set(module.modules())):
            other.register_forward_pre_hook(_cast_inputs)
            if not keep_dtype:
                other.register_forward_hook(lambda _m, _a, out: _cast(out, before))


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the base computes in, whatever its masters are held in."""
    cast = next((m.dtype for m in model.modules() if isinstance(m, _Cast)), None)
    return next(model.parameters()).dtype if cast is None else cast


@torch.no_grad()
def set_value(model: nn.Module, name: str, value: Tensor) -> None:
    """Write ``value`` into the parameter ``name``, or into its master if it has one."""
    owner, _, end = name.rpartition(".")
    module = model.get_submodule(owner)
    moved = parametrize.is_parametrized(module, end)
    target = module.parametrizations[end].original if moved else getattr(module, end)  # type: ignore[index, union-attr]
    if not target.is_meta:
        target.copy_(value)


def plain_name(name: str) -> str:
    """The base model's own name of a parameter that ``keep_master`` may have moved."""
    return _INSIDE.sub(r"\1", name)


def _cast(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _cast_inputs(_module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(_cast(value, torch.float32) for value in inputs)
