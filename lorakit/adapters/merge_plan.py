"""Which tensors the merged model has, and where each comes from."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from lorakit.adapters.base_model import check_supplied
from lorakit.adapters.checkpoint import Checkpoint
from lorakit.adapters.files import AdapterFiles, is_finite
from lorakit.adapters.place import Placement, find_places
from lorakit.adapters.shards import OutputTensor
from lorakit.adapters.weighted import Update, Weighted, find_updates, merged_sum
from lorakit.errors import AdapterError

Ties = Sequence[Sequence[str]]


class NotByName(Exception):
    """The checkpoint's tensors are not the model's under their own names."""


@dataclass(frozen=True)
class MergePlan:
    """``outputs`` are what is written, by the model's names, of which ``dtype`` is the main one.

    A tensor is the adapter file's ``given`` one, or the base's (``sources``: name -> checkpoint's
    name), with the updates in ``adapted`` folded in. ``untied``: tied embeddings are no longer one.
    """

    architecture: str
    checkpoint: Checkpoint
    outputs: Mapping[str, OutputTensor]
    sources: Mapping[str, str]
    given: Mapping[str, Tensor]
    adapted: Mapping[str, Sequence[Update]]
    untied: bool
    dtype: str

    def value(self, name: str) -> Tensor:
        """The tensor as it is written: float32 arithmetic, rounded once."""
        given = self.given.get(name)
        weight = self.checkpoint.read(self.sources[name]) if given is None else given
        if name in self.adapted:
            weight = merged_sum(self.adapted[name], weight)
        merged = weight.to(self.outputs[name].dtype).contiguous()
        check_finite(name, merged)
        return merged

    @property
    def unused(self) -> tuple[str, ...]:
        """The base's tensors that the model has no place for."""
        return tuple(sorted(set(self.checkpoint.tensors) - set(self.sources.values())))


def check_finite(name: str, merged: Tensor) -> None:
    """Raise AdapterError for a tensor that no model should be written with."""
    if not is_finite(merged):
        dtype = str(merged.dtype).removeprefix("torch.")
        raise AdapterError(
            f"{name}: NaN or infinite in the merged {dtype}: either the base's own values are, or "
            "the sum is too large for the dtype (dtype float32 holds more)"
        )


def plan_merge(
    model: PreTrainedModel, checkpoint: Checkpoint, adapters: Sequence[Weighted], dtype: str | None
) -> MergePlan:
    """Plan the merge of ``adapters`` into ``checkpoint``, whose empty model is ``model``. What is
    trained whole is the first one's.

    Raises NotByName where transformers converts the checkpoint on loading, AdapterError if base
    and adapter do not fit, or together lack a weight.
    """
    if get_model_conversion_mapping(model, add_legacy=False):
        raise NotByName(f"transformers converts the weights of {type(model).__name__} on loading")
    state = dict(model.state_dict(keep_vars=True))
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    ties = _ties(state)
    files = adapters[0].files
    places = find_places(model, files)
    adapted = {f"{name}.weight": found for name, found in find_updates(model, adapters).items()}
    sources = _sources(shapes, ties, checkpoint, model.base_model_prefix)
    _check_present(shapes, sources, places, checkpoint, files)
    given = {**places.base, **places.whole}
    for names in ties:  # PEFT's copy of a base weight stands for all that share it
        for name in names if (found := set(names) & set(places.base)) else ():
            given.setdefault(name, given[min(found)])
    parted = [names for names in ties if _is_parted(names, places.whole, adapted)]
    if parted and not _can_part(model, parted):
        raise AdapterError(f"{parted[0]}: {type(model).__name__} cannot part these shared weights")
    main = dtype or _main_dtype(checkpoint)
    left_out = {n for names in ties if names not in parted for n in _copies(names, checkpoint)}
    outputs = {
        name: OutputTensor(shape, _dtype(checkpoint, sources.get(name), dtype, main))
        for name, shape in shapes.items()
        if name not in left_out
    }
    return MergePlan(
        architecture=type(model).__name__,
        checkpoint=checkpoint,
        outputs=outputs,
        sources=sources,
        given=given,
        adapted=adapted,
        untied=bool(parted),
        dtype=main,
    )


def _ties(state: Mapping[str, Tensor]) -> list[list[str]]:
    shared: dict[int, list[str]] = {}
    for name, value in state.items():
        shared.setdefault(id(value), []).append(name)
    return [names for names in shared.values() if len(names) > 1]


def _sources(
    names: Collection[str], ties: Ties, checkpoint: Checkpoint, prefix: str
) -> dict[str, str]:
    """Model's name -> checkpoint's: the same, or without the base model's prefix (the checkpoint
    of a bare encoder)."""
    sources = {}
    for name in names:
        for candidate in (name, name.removeprefix(f"{prefix}.")):
            if candidate in checkpoint.tensors:
                sources[name] = candidate
                break
    for tied in ties:
        found = next((sources[name] for name in tied if name in sources), None)
        for name in tied if found is not None else ():
            sources.setdefault(name, str(found))
    return sources


def _check_present(
    shapes: Mapping[str, tuple[int, ...]],
    sources: dict[str, str],
    places: Placement,
    checkpoint: Checkpoint,
    files: AdapterFiles,
) -> None:
    lacking = set(shapes) - set(sources)
    supplied = {**places.base, **places.whole}
    if absent := lacking - set(supplied):
        if unused := sorted(set(checkpoint.tensors) - set(sources.values())):
            raise NotByName(f"the base has {unused[0]}, and no {min(absent)}")
        check_supplied(lacking, supplied, str(checkpoint.directory), files)
    for name, source in list(sources.items()):
        have = checkpoint.tensors[source].shape
        if name in places.whole and have != shapes[name]:
            del sources[name]  # a head for another number of labels
        elif have != shapes[name]:
            raise AdapterError(
                f"{checkpoint.directory}: {source} is {have}, and the configuration says "
                f"{shapes[name]}"
            )


def _is_parted(
    names: Sequence[str],
    whole: Mapping[str, Tensor],
    adapted: Collection[str],
) -> bool:
    """Whether weights that the base shares differ after the merge."""
    given = [name for name in names if name in whole]
    if any(name in adapted for name in names):
        return True
    same = len(given) == len(names) and all(whole[n].equal(whole[given[0]]) for n in given)
    return bool(given) and not same


def _copies(names: Sequence[str], checkpoint: Checkpoint) -> list[str]:
    """All but the one of shared weights that is written: the base's own choice."""
    kept = next((name for name in names if name in checkpoint.tensors), names[0])
    return [name for name in names if name != kept]


def _can_part(model: PreTrainedModel, parted: Ties) -> bool:
    config = copy.deepcopy(model.config)
    part_embeddings(config)
    with torch.device("meta"):
        state = type(model)(config).state_dict(keep_vars=True)
    return all(len({id(state[name]) for name in names}) == len(names) for names in parted)


def part_embeddings(config: PreTrainedConfig) -> None:
    """Say in the configuration that input and output embeddings are two matrices."""
    parts: tuple[Any, ...] = (config, config.get_text_config())
    for part in parts:
        part.tie_word_embeddings = False


def _main_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most of the base's values."""
    count: Counter[torch.dtype] = Counter()
    for stored in checkpoint.tensors.values():
        if stored.dtype.is_floating_point:
            count[stored.dtype] += OutputTensor(stored.shape, stored.dtype).parameters
    return str(count.most_common(1)[0][0]).removeprefix("torch.")


def _dtype(
    checkpoint: Checkpoint, source: str | None, wanted: str | None, main: str
) -> torch.dtype:
    stored = checkpoint.tensors[source].dtype if source is not None else getattr(torch, main)
    assert isinstance(stored, torch.dtype)
    if wanted is not None and stored.is_floating_point:
        chosen = getattr(torch, wanted)
        assert isinstance(chosen, torch.dtype)
        return chosen
    return stored
