"""Reads adapters of single experts, which were linear layers in transformers 4.

transformers 5 stacks the experts when it reads a checkpoint: ``mlp.experts.3.gate_proj.weight``
becomes a part of ``mlp.experts.gate_up_proj``. An adapter becomes one of the stack by the same
rules. Where its rows come from two matrices, their A are stacked as well, and each B keeps its own
rows and columns: delta = [s_1 B_1, 0; 0, s_2 B_2] [A_1; A_2].
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from lorakit.adapters.peft.parameters import stored_factors
from lorakit.adapters.peft.ranks import exact_settings, peft_rank, peft_scaling
from lorakit.adapters.peft.read import AdapterFiles
from lorakit.adapters.peft.schema import LINEAR_FACTORS
from lorakit.base_weight import ADAPTABLE
from lorakit.errors import AdapterError

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class _Place:
    """Where the matrix of a module of transformers 4 is now: the ``block`` of so many ``blocks`` of
    rows of ``expert`` in a ``parameter``, or all of it if ``expert`` is None."""

    parameter: str
    expert: int | None = None
    block: int = 0
    blocks: int = 1


def with_stacked_experts(model: nn.Module, files: AdapterFiles) -> AdapterFiles:
    """Return ``files`` with LoRA's factors of single experts, and of routers that are no linear
    layers any more, as those of the parameters of ``model``. Raises AdapterError for a matrix that
    does not fit its stack."""
    if not isinstance(model, PreTrainedModel) or files.config.get("use_dora"):
        return files
    end = f".{LINEAR_FACTORS.A}"
    linear = {name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)}
    adapted = [key.removesuffix(end) for key in files.tensors if key.endswith(end)]
    places = _places(model, [name for name in adapted if name not in linear])
    if not places:
        return files
    tensors = dict(files.tensors)
    scalings = {}
    by_parameter: dict[str, dict[str, _Place]] = {}
    for name, place in places.items():
        by_parameter.setdefault(place.parameter, {})[name] = place
    for parameter, own in by_parameter.items():
        try:
            A, B = _stack(model.get_parameter(parameter), own, files.config, tensors)
        except AdapterError as error:
            raise AdapterError(f"{files.directory}: {error}") from error
        scalings[parameter] = A.shape[-2], 1.0
        stored = zip(LINEAR_FACTORS, stored_factors(A, B), strict=True)
        tensors |= {f"{parameter}.{factor}": value for factor, value in stored}
    config = files.config | {
        "target_parameters": [*(files.config.get("target_parameters") or ()), *sorted(by_parameter)]
    }
    for key, patterns in exact_settings(scalings, bool(config.get("use_rslora"))).items():
        config[key] = patterns | (config.get(key) or {})
    return dataclasses.replace(files, config=config, tensors=tensors)


def _places(model: PreTrainedModel, names: list[str]) -> dict[str, _Place]:
    """The places of those modules ``names`` whose matrices are in parameters of ``model``."""
    if not names:
        return {}
    mapping = get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    state: dict[str, Any] = dict(model.named_parameters())
    found = {}
    for name in names:
        target, pattern = rename_source_key(
            f"{name}.weight", renamings, converters, model.base_model_prefix, state
        )
        if target not in state:
            continue
        if pattern is None:
            if not isinstance(model.get_submodule(target.rpartition(".")[0]), ADAPTABLE):
                found[name] = _Place(target)
            continue
        converter = next(c for c in converters if pattern in c.source_patterns)
        expert, sources = _EXPERT.search(f"{name}."), converter.source_patterns
        if expert is not None and _stacks_rows(converter, state[target]):
            found[name] = _Place(target, int(expert[1]), sources.index(pattern), len(sources))
    return found


def _stacks_rows(converter: WeightConverter, parameter: Tensor) -> bool:
    """Whether the converter stacks experts, and the rows of several matrices of each."""
    merge, *more = converter.operations
    rows = all(isinstance(each, Concatenate) and each.dim == 1 for each in more) and len(more) < 2
    return isinstance(merge, MergeModulelist) and merge.dim == 0 and rows and parameter.ndim == 3


def _stack(
    parameter: Tensor,
    places: Mapping[str, _Place],
    config: Mapping[str, Any],
    tensors: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """A and B of the parameter, with a scaling of 1, from the factors of the modules ``places``,
    which are removed from ``tensors``. What is not adapted is zero."""
    *stack, out_features, in_features = parameter.shape
    factors = {name: _factors(name, config, tensors) for name in places}
    blocks = next(iter(places.values())).blocks
    ranks = [
        max((len(factors[n][0]) for n, p in places.items() if p.block == block), default=0)
        for block in range(blocks)
    ]
    rows = out_features // blocks
    first = next(iter(factors.values()))[0]
    A = first.new_zeros(*stack, sum(ranks), in_features)
    B = first.new_zeros(*stack, out_features, sum(ranks))
    for name, place in places.items():
        own_A, own_B = factors[name]
        index = () if place.expert is None else (place.expert,)
        fits = place.expert is None or place.expert < stack[0]
        if not fits or own_A.shape[1] != in_features or len(own_B) != rows:
            raise AdapterError(
                f"{name}: factors of {tuple(own_A.shape)} and {tuple(own_B.shape)} do not fit "
                f"{place.parameter} of {tuple(parameter.shape)}: the adapter belongs to another "
                "base model"
            )
        at = sum(ranks[: place.block])
        columns = slice(at, at + len(own_A))
        A[(*index, columns)] = own_A
        B[(*index, slice(place.block * rows, (place.block + 1) * rows), columns)] = own_B
    return A, B


def _factors(
    name: str, config: Mapping[str, Any], tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """A and scaling * B of the module ``name`` in float32, which are removed from ``tensors``."""
    r = peft_rank(config, name)
    keys = [f"{name}.{factor}" for factor in LINEAR_FACTORS]
    found = [tensors.pop(key, None) for key in keys]
    A, B = found
    if A is None or B is None:
        raise AdapterError(f"missing tensors: {keys[found.index(None)]}")
    if A.ndim != 2 or B.ndim != 2 or (len(A), B.shape[1]) != (r, r):
        raise AdapterError(f"{name}: factors of {tuple(A.shape)} and {tuple(B.shape)}: r = {r}")
    return A.float(), B.float() * peft_scaling(config, name, r)
