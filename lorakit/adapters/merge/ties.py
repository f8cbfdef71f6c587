"""Which tied weights the checkpoint shares, and which of them differ after the merge."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorakit.adapters.merge.checkpoint import Checkpoint
from lorakit.adapters.merge.updates import ResolvedBase, Ties


@dataclass(frozen=True)
class Shared:
    """``together``: ties that the checkpoint has as well. ``stored_apart``: whether others are
    stored with different values, which transformers then keeps."""

    together: Ties
    stored_apart: bool


def find_shared(base: ResolvedBase, checkpoint: Checkpoint, by_name: Mapping[str, str]) -> Shared:
    """Return the ties that the checkpoint has too. ``by_name``: parameter -> stored name."""
    together: list[Sequence[str]] = []
    apart = False
    for names in base.ties:
        stored = [by_name[name] for name in names if name in by_name]
        if len(stored) > 1 and not all(_equal(checkpoint, stored[0], s) for s in stored[1:]):
            apart = True
        else:
            together.append(names)
    return Shared(together, apart)


def all_given(base: ResolvedBase, shared: Shared) -> dict[str, Tensor]:
    """Return the adapter's own values. PEFT's copy of a base weight applies to all tied names."""
    given = base.given
    for names in shared.together:
        for name in names if (found := set(names) & set(base.base)) else ():
            given.setdefault(name, given[min(found)])
    return given


def is_untied(
    names: Sequence[str], fully_trained: Mapping[str, Tensor], adapted: Collection[str]
) -> bool:
    """Whether the tied weights ``names`` differ after the merge."""
    given = [name for name in names if name in fully_trained]
    if any(name in adapted for name in names):
        return True
    same = len(given) == len(names) and all(
        fully_trained[n].equal(fully_trained[given[0]]) for n in given
    )
    return bool(given) and not same


def new_names(
    base: ResolvedBase,
    shared: Shared,
    untied: Ties,
    by_name: Mapping[str, str],
    given: Mapping[str, Tensor],
) -> dict[str, str | None]:
    """Return the parameters that are written but not stored -> the stored tensor they shared."""
    new: dict[str, str | None] = {}
    tied: set[str] = set()
    for names in shared.together:
        source = next((by_name[name] for name in names if name in by_name), None)
        if names in untied:
            new |= {name: source for name in names if name not in by_name}
            continue
        tied |= set(names)
        if source is None and names[0] in given:
            new[names[0]] = None
    in_groups = {name for group in base.groups for name in group.targets}
    absent = [name for name in given if name not in by_name and name not in tied | in_groups]
    return dict.fromkeys(absent) | new


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two stored tensors are equal, compared in chunks of bytes."""
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
