"""Adapters on single parameters of a module, such as the experts of a mixture in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lorakit.anatomy import (
    Weight,
    is_within,
    outside_language_model,
    reads_past_forward,
    weights,
)
from lorakit.base_weight import ADAPTABLE, ParameterView, as_matrix
from lorakit.errors import AdapterError, TargetError
from lorakit.kernels.low_rank_weight import LowRankWeight
from lorakit.layers import AdapterLayer, BaseWrapper, adapted_modules
from lorakit.module_names import matches


class AdaptedParameters(nn.Module):
    """Replaces ``base_layer``, whose forward pass runs with W + delta in place of the parameters in
    ``parts``.

    The parts, children by the parameters' names, are layers on a ``ParameterView`` of
    ``base_layer``. Low-rank updates are multiplied by the activations (``LowRankWeight``). Others,
    and those of compiled models, are added to W in each pass, and the sum is kept for the backward
    pass.
    """

    def __init__(self, base_layer: nn.Module, parts: Mapping[str, AdapterLayer]) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name, part in parts.items():
            if not isinstance(part.base_layer, ParameterView) or hasattr(self, name):
                raise AdapterError(f"the parameter {name!r} cannot be adapted: its name is in use")
            self.add_module(name, part)

    @property
    def parts(self) -> dict[str, AdapterLayer]:
        """Parameter -> its layer."""
        return {n: m for n, m in self.named_children() if isinstance(m, AdapterLayer)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = {name: _adapted(part) for name, part in self.parts.items()}
        return functional_call(self.base_layer, weights, args, kwargs)


@runtime_checkable
class _LowRank(Protocol):
    """A layer whose update is scaling * B A."""

    scaling: float

    def factors(self) -> tuple[Tensor, Tensor]: ...


def _adapted(part: AdapterLayer) -> Tensor:
    """W + delta, as the base stores W and in its dtype."""
    weight, view = part.weight, part.base_layer
    if not isinstance(part, _LowRank) or torch.compiler.is_compiling():
        return weight + as_matrix(view, part.delta_weight()).to(weight.dtype)
    A, B = part.factors()
    A, B = A.to(weight.dtype), (B * part.scaling).to(weight.dtype)
    # Grouped products need rows of a multiple of 16 bytes.
    if missing := -part.r % (16 // weight.itemsize):
        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    transposed = isinstance(view, ParameterView) and view.is_transposed
    return LowRankWeight.of(weight, A.mT, B.mT) if transposed else LowRankWeight.of(weight, B, A)


#: What may stand in the place of a module of the base.
Replacement = BaseWrapper | AdaptedParameters


def with_adapted_parameters(
    model: nn.Module, layers: Mapping[str, BaseWrapper]
) -> dict[str, Replacement]:
    """``layers`` by the names of the modules that they replace, those of parameters as one layer
    for each module. Raises AdapterError if that layer has another use for a parameter's name."""
    found: dict[str, Replacement] = {}
    parts: dict[str, dict[str, AdapterLayer]] = {}
    for name, layer in layers.items():
        if isinstance(layer, AdapterLayer) and isinstance(layer.base_layer, ParameterView):
            owner, _, parameter = name.rpartition(".")
            parts.setdefault(owner, {})[parameter] = layer
        else:
            found[name] = layer
    for owner, own in parts.items():
        found[owner] = AdaptedParameters(model.get_submodule(owner), own)
    return found


def replaced_modules(model: nn.Module) -> dict[str, Replacement]:
    """The layer of every replaced module by name: ``adapted_modules``, with the layer of a module
    instead of those of its parameters."""
    found: dict[str, Replacement] = {}
    for name, layer in adapted_modules(model).items():
        if isinstance(layer.base_layer, ParameterView):
            owner = name.rpartition(".")[0]
            parent = model.get_submodule(owner)
            assert isinstance(parent, AdaptedParameters), owner
            found[owner] = parent
        else:
            found[name] = layer
    return found


def stacked_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the parameters that hold the weights of all experts, by the name of the
    parameter."""
    names = [w.name for w in _expert_weights(model)]
    return {n: module for name in names for n, module in find_parameters(name, model).items()}


def find_parameters(target: str, model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the parameters that ``target``, a suffix or a pattern, matches, by the name of
    the parameter. Raises TargetError if there are none, or if one is not a matrix or stack of
    matrices that its module applies."""
    start = f"adapter.target_parameters: {target!r}"
    outside = outside_language_model(model)
    names = [n for n, _ in model.named_parameters() if not is_within(n, outside)]
    found = [name for name in names if matches(target, name)]
    if not found:
        ends = sorted({".".join(w.name.split(".")[-3:]) for w in _expert_weights(model)})
        raise TargetError(
            f"{start} matches no parameter; allowed: {', '.join(ends) or 'parameters'}, or other "
            "parameters that belong to no linear layer"
        )
    targets = {}
    for name in found:
        owner, _, end = name.rpartition(".")
        module = model.get_submodule(owner)
        if reason := _not_adaptable(model, owner, module, getattr(module, end)):
            raise TargetError(f"{start}: {name} {reason}")
        targets[name] = module
    return targets


def _not_adaptable(
    model: nn.Module, owner: str, module: nn.Module, parameter: nn.Parameter
) -> str | None:
    """Why a parameter of the module ``owner`` cannot be adapted by itself, if that is so."""
    if isinstance(module, ADAPTABLE):
        return (
            f"belongs to a {type(module).__name__}; hint: target_modules: "
            f"[{owner.rpartition('.')[2]}]"
        )
    if parameter.ndim not in (2, 3) or isinstance(module, nn.Conv1d) or 1 in parameter.shape[-2:]:
        shape = tuple(parameter.shape)
        return f"is not a matrix or a stack of matrices, but {shape}; allowed: 2 or 3 dimensions"
    if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        dtype = str(parameter.dtype).removeprefix("torch.")
        return f"is stored as {dtype}; allowed: float32, bfloat16, float16"
    if not owner or reads_past_forward(model, owner):
        return "is read by the model without calling its module, so an adapter would have no effect"
    return None


def _expert_weights(model: nn.Module) -> list[Weight]:
    found = weights(model, outside_language_model(model))
    return [weight for weight in found if weight.part == "expert" and weight.stacked]
