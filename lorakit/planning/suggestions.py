"""What to change in a recipe that needs more memory than there is."""

from __future__ import annotations

from collections.abc import Callable
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
    found: list[Suggestion] = []
    alternatives = _alternatives(recipe, device_type)
    for group in alternatives:
        found += _first_that_fits(group, peak_bytes, usable_bytes, peak_of)
    if not any(suggestion.fits for suggestion in found):
        found += _first_that_fits(_together(alternatives), peak_bytes, usable_bytes, peak_of)
    return sorted(found, key=lambda suggestion: not suggestion.fits)


def _first_that_fits(
    changes: list[Changes], peak: int, usable: int, peak_of: PeakOf
) -> list[Suggestion]:
    """The first of the changes that fits, or else the last that the model supports and that lowers
    the peak; none if there is none."""
    found: list[Suggestion] = []
    for change in changes:
        try:
            after = peak_of(change)
        except UserError:
            continue
        if after < peak:
            found = [Suggestion(change, after, after <= usable)]
            if after <= usable:
                break
    return found


def _alternatives(recipe: Recipe, device_type: str) -> list[list[Changes]]:
    """Changes of one kind, from the least to the most; the kinds from those that leave the results
    as they are to those that change them."""
    section = recipe.train
    found: list[list[Changes]] = []
    checkpointing = "train.gradient_checkpointing"
    if section.gradient_checkpointing is False:
        found.append([{checkpointing: True}])
    if section.gradient_checkpointing != "offload" and device_type == "cuda":
        found.append([{checkpointing: "offload"}])
    found.append(_smaller_batches(recipe))
    if recipe.model.base_precision != "nf4" and recipe.adapter.method not in ("full", "bitfit"):
        found.append([{"model.base_precision": "nf4"}])
    length = recipe.task.max_length
    found.append([{"task.max_length": length // parts} for parts in (2, 4) if length >= 2 * parts])
    return found


def _smaller_batches(recipe: Recipe) -> list[Changes]:
    section, length = recipe.train, recipe.task.max_length
    if (tokens := section.max_tokens_per_batch) is not None:
        parts = [2**n for n in range(1, 8) if tokens // 2**n >= length]
        return [{"train.max_tokens_per_batch": tokens // n} for n in parts]
    size, steps = section.units_per_batch or 1, section.gradient_accumulation_steps
    return [
        {
            "train.per_device_batch_size": size // n,
            "train.gradient_accumulation_steps": steps * n,
        }
        for n in sorted({2**n for n in range(1, 12)} | {size})
        if size % n == 0 and 1 < n <= size
    ]


def _together(alternatives: list[list[Changes]]) -> list[Changes]:
    """The most of each kind, one after the other, but for a length that loses text."""
    found: list[Changes] = []
    for group in alternatives:
        if group and "task.max_length" not in group[-1]:
            found.append((found[-1] if found else {}) | group[-1])
    return found[1:]
