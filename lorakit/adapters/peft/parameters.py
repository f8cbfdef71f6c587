"""Adapters of single parameters, such as stacked experts, in PEFT's form (``target_parameters``).

For a stack of E matrices PEFT stores A as (E r, in) and B as (out, r E), where the expert is the
fastest index of a column. It wraps a module once for each of its parameters, so that a tensor has
the name of the module and ``.base_layer`` for each further wrapper: the last parameter is the
outermost. Inside lorakit, such a tensor has the name of the parameter.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.peft.read import AdapterFiles
from lorakit.adapters.peft.targets import target_modules, unadapted_modules
from lorakit.base_weight import ParameterView
from lorakit.layers import AdapterLayer
from lorakit.module_names import is_suffix, without_wrappers

_FACTOR = re.compile(r"(.+?)((?:\.base_layer)*)\.(lora_[AB]\.weight)")


def stored_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's tensors of A (E, r, in) and B (E, out, r), or of two matrices."""
    if A.ndim == 2:
        return A, B
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def stacked_factors(A: Tensor, B: Tensor, stack: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The reverse of ``stored_factors`` for ``stack`` = (E,), or () for two matrices."""
    if not stack:
        return A, B
    return A.unflatten(0, (*stack, -1)), B.unflatten(1, (-1, *stack)).permute(2, 0, 1).contiguous()


def wrapper_names(layers: Mapping[str, AdapterLayer]) -> dict[str, str]:
    """The names that PEFT's tensors of each layer start with, by the name of the layer."""
    names = {name: name for name in layers}
    owners: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if isinstance(layer.base_layer, ParameterView):
            owners.setdefault(name.rpartition(".")[0], []).append(name)
    for owner, own in owners.items():
        view = layers[own[0]].base_layer
        assert isinstance(view, ParameterView)
        order = [f"{owner}.{end}" for end, _ in view.module.named_parameters(recurse=False)]
        for depth, name in enumerate(sorted(own, key=order.index, reverse=True)):
            names[name] = owner + ".base_layer" * depth
    return names


def target_parameters(adapted: Iterable[str], model: nn.Module) -> list[str]:
    """The shortest suffixes for which PEFT adapts exactly the parameters ``adapted``."""
    adapted = list(adapted)
    names = [
        f"{name}.{end}"
        for name, module in unadapted_modules(model).items()
        for end, _ in module.named_parameters(recurse=False)
    ]
    found = target_modules(adapted, names, {})
    return adapted if isinstance(found, str) else found


def parameter_views(model: nn.Module, config: Mapping[str, Any]) -> dict[str, ParameterView]:
    """The parameters that ``target_parameters`` of an adapter select, by name."""
    targets = [".".join(without_wrappers(name)) for name in config.get("target_parameters") or ()]
    if not targets:
        return {}
    return {
        name: ParameterView(module, end)
        for owner, module in unadapted_modules(model).items()
        for end, _ in module.named_parameters(recurse=False)
        if any(is_suffix(target, name := f"{owner}.{end}") for target in targets)
    }


def with_parameter_names(model: nn.Module, files: AdapterFiles) -> AdapterFiles:
    """Return ``files`` with the tensors of parameters under the parameters' names."""
    owned: dict[tuple[str, ...], list[str]] = {}
    for name in parameter_views(model, files.config):
        owner, _, end = name.rpartition(".")
        owned.setdefault(tuple(without_wrappers(owner)), []).append(end)
    if not owned:
        return files
    tensors = {}
    for key, value in files.tensors.items():
        name = key
        if match := _FACTOR.fullmatch(key):
            own = owned.get(tuple(without_wrappers(match[1])), [])
            depth = match[2].count(".base_layer")
            if depth < len(own):
                name = f"{match[1]}.{own[-1 - depth]}.{match[3]}"
        tensors[name] = value
    return dataclasses.replace(files, tensors=tensors)
