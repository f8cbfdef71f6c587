"""Train base parameters in float32 while the model computes in half precision.

A half-precision parameter rounds small updates away. Mixed-precision training keeps an fp32 master
weight and casts it for each forward pass (Micikevicius et al. 2018, section 3.1).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_MASTER = re.compile(r"parametrizations\.(\w+)\.original$")


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self.dtype)


def train_parameter(model: nn.Module, name: str) -> None:
    """Make the parameter ``name`` trainable, with an fp32 master weight.

    Its module still sees it in the model's dtype, cast in each forward pass; modules that share the
    parameter share its master weight.
    """
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if parametrize.is_parametrized(module, attribute):
        return  # another name of a shared parameter
    parameter = getattr(module, attribute)
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


def train_module(model: nn.Module, name: str, float32_output: bool) -> None:
    """Make the module ``name`` fully trainable, in float32; its inputs are cast.

    Its output is cast back to the model's dtype, so that later layers are unaffected, unless
    ``float32_output`` (a head). Modules that share its parameters (tied embeddings) are cast alike.
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
            other.register_forward_pre_hook(cast_inputs)
            if not float32_output:
                other.register_forward_hook(lambda _m, _a, out: _cast(out, before))


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the base computes in, regardless of the dtype of its master weights."""
    cast = next((m.dtype for m in model.modules() if isinstance(m, _Cast)), None)
    return next(model.parameters()).dtype if cast is None else cast


@torch.no_grad()
def set_value(model: nn.Module, name: str, value: Tensor) -> None:
    """Copy ``value`` into the parameter ``name``, or into its master weight if it has one."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if parametrize.is_parametrized(module, attribute):
        target = module.parametrizations[attribute].original  # type: ignore[index, union-attr]
    else:
        target = getattr(module, attribute)
    if not target.is_meta:
        target.copy_(value)


def plain_name(name: str) -> str:
    """The base model's name of a parameter: a master weight's without the parametrization."""
    return _MASTER.sub(r"\1", name)


def _cast(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def cast_inputs(_module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    """The hook of a module that ``train_module`` trains in float32."""
    return tuple(_cast(value, torch.float32) for value in inputs)
