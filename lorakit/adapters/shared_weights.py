"""Weights that a class shares (tied embeddings): which the checkpoint shares too, and which a merge
makes different."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorakit.adapters.checkpoint import Checkpoint
from lorakit.adapters.held import Held, Ties


@dataclass(frozen=True)
class Shared:
    """``together``: names of one parameter that are one in the checkpoint, too;
    ``stored_apart``: others are stored with different values, which transformers then keeps."""

    together: Ties
    stored_apart: bool


def find_shared(held: Held, checkpoint: Checkpoint, by_name: Mapping[str, str]) -> Shared:
    """Which of the class's ties the checkpoint has too; ``by_name``: the class's name -> stored."""
    together: list[Sequence[str]] = []
    apart = False
    for names in held.ties:
        stored = [by_name[name] for name in names if name in by_name]
        if len(stored) > 1 and not all(_equal(checkpoint, stored[0], s) for s in stored[1:]):
            apart = True
        else:
            together.append(names)
    return Shared(together, apart)


def all_given(held: Held, shared: Shared) -> dict[str, Tensor]:
    """What the adapter has whole; PEFT's copy of a base weight stands for all that share it."""
    given = held.given
    for names in shared.together:
        for name in names if (found := set(names) & set(held.base)) else ():
            given.setdefault(name, given[min(found)])
    return given


def is_parted(
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


def new_names(
    held: Held,
    shared: Shared,
    parted: Ties,
    by_name: Mapping[str, str],
    given: Mapping[str, Tensor],
) -> dict[str, str | None]:
    """The class's names that are written and not stored -> the stored tensor they shared."""
    new: dict[str, str | None] = {}
    one: set[str] = set()
    for names in shared.together:
        source = next((by_name[name] for name in names if name in by_name), None)
        if names in parted:
            new |= {name: source for name in names if name not in by_name}
            continue
        one |= set(names)
        if source is None and names[0] in given:
            new[names[0]] = None
    in_groups = {name for group in held.groups for name in group.targets}
    absent = [name for name in given if name not in by_name and name not in one | in_groups]
    return dict.fromkeys(absent) | new


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two stored tensors hold the same values; bytes are compared piece by piece."""
    a, b = checkpoint.tensors[one], checkpoint.tensors[other]
    if (a.shape, a.code) != (b.shape, b.code):
        return False
    step = 2**22
    for at in range(0, a.size_bytes, step):
        count = min(step, a.size_bytes - at)
        pieces = [os.pread(checkpoint.descriptor(t.file), count, t.start + at) for t in (a, b)]
        if pieces[0] != pieces[1]:
            return False
    return True
