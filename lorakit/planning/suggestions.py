"""What to change in a recipe that needs more memory than there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.errors import UserError
from lorakit.recipe.sections import Recipe

#: The peak in bytes with other values of keys.
PeakOf = Callable[[dict[str, Any]], int]
Changes = dict[str, Any]


@dataclass(frozen=True)
class Suggestion:
    """Keys of the recipe with other values, the peak of the memory with them, and whether that
    fits."""

    set: Changes
    peak_bytes: int
    fits: bool


def suggestions(
    recipe: Recipe, peak_bytes: int, usable_bytes: int, device_type: str, peak_of: PeakOf
) -> list[Suggestion]:
    """The changes that lower ``peak_bytes``, those that fit first, in the order of what they cost.
    Keys are changed together only if none fits alone."""
    found = []
    alone = list(_single_changes(recipe, device_type))
    for change in alone:
        found += _try(change, peak_bytes, usable_bytes, peak_of)
    if not any(suggestion.fits for suggestion in found):
        together: Changes = {}
        for change in _most_together(alone):
            together |= change
            if len(together) > len(change):
                found += _try(dict(together), peak_bytes, usable_bytes, peak_of)
            if found and found[-1].fits:
                break
    return sorted(found, key=lambda suggestion: not suggestion.fits)


def _try(change: Changes, peak: int, usable: int, peak_of: PeakOf) -> list[Suggestion]:
    """The change as a suggestion, if the model supports it and it lowers the peak."""
    try:
        after = peak_of(change)
    except UserError:
        return []
    return [Suggestion(change, after, after <= usable)] if after < peak else []


def _single_changes(recipe: Recipe, device_type: str) -> Iterator[Changes]:
    """From those that leave the results as they are to those that change them."""
    section, task = recipe.train, recipe.task
    checkpointing = "train.gradient_checkpointing"
    if section.gradient_checkpointing is False:
        yield {checkpointing: True}
    if section.gradient_checkpointing != "offload" and device_type == "cuda":
        yield {checkpointing: "offload"}
    size, steps = section.units_per_batch, section.gradient_accumulation_steps
    if section.max_tokens_per_batch is not None:
        tokens = section.max_tokens_per_batch // 2
        if tokens >= task.max_length:
            yield {"train.max_tokens_per_batch": tokens}
    elif size is not None:
        for parts in _splits(size):
            yield {
                "train.per_device_batch_size": size // parts,
                "train.gradient_accumulation_steps": steps * parts,
            }
    trains_base = recipe.adapter.method in ("full", "bitfit")
    if recipe.model.base_precision != "nf4" and not trains_base:
        yield {"model.base_precision": "nf4"}
    if task.max_length > 1:
        yield {"task.max_length": task.max_length // 2}


def _splits(size: int) -> list[int]:
    """In two, and into single rows."""
    return sorted({parts for parts in (2, size) if size % parts == 0 and parts > 1})


def _most_together(alone: list[Changes]) -> list[Changes]:
    """The last change of each key, but for the length, which loses text."""
    return [change for change in alone if "task.max_length" not in change]
