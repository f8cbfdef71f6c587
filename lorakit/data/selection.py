"""Splits of some of the rows of another split, and held-out rows for validation."""

from __future__ import annotations

import hashlib
import random
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from lorakit.data.rows import SelectedRows
from lorakit.data.shares import apportion
from lorakit.data.sources import Split, with_counts


def select(split: Split, indices: Sequence[int], name: str) -> Split:
    """The split ``name`` of the rows at ``indices``, which increase."""
    digest = hashlib.sha256(f"{split.fingerprint}:".encode() + array("q", indices).tobytes())
    rows: Any = split.rows
    if hasattr(rows, "features"):
        rows = rows.select(indices, new_fingerprint=digest.hexdigest()[:16])
    else:
        rows = SelectedRows(rows, indices)
    counts, numbers = _numbered([count for _, count in split.files] or [len(split)], indices)
    if split.numbers is not None:
        numbers = array("q", (split.numbers[index] for index in indices))
    of_sources, _ = _numbered([source.rows for source in split.sources], indices)
    return replace(
        split,
        name=name,
        rows=rows,
        fingerprint=digest.hexdigest(),
        files=tuple((file, count) for (file, _), count in zip(split.files, counts, strict=False)),
        sources=with_counts(split.sources, of_sources),
        numbers=numbers,
    )


def _numbered(sizes: Sequence[int], indices: Sequence[int]) -> tuple[list[int], array[int]]:
    """How many of the ``indices`` are in each part of ``sizes`` rows, and their numbers in it."""
    counts, numbers = [0] * len(sizes), array("q")
    ends = list(accumulate(sizes))
    for index in indices if sizes else ():
        part = bisect_right(ends, index)
        counts[part] += 1
        numbers.append(index - ends[part] + sizes[part] + 1)
    return counts, numbers


def held_out(share: float, keys: Mapping[int, tuple[Hashable, ...]], seed: int) -> list[int]:
    """Choose ``share`` of the rows at random, the same share of those with each key, and return
    their indices in order.

    ``keys`` maps the index of each row that may be chosen to (source, class). Classes of a source
    that would contribute less than one row are taken together; the only row left of such a class
    is chosen last. Never all rows of a group are chosen.
    """
    sizes = Counter(keys.values())
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in keys.items():
        groups[key if share * sizes[key] >= 1 else key[:1]].append(index)
    generator = random.Random(seed)
    chosen: list[int] = []
    total = int(share * len(keys) + 0.5)
    counts = apportion(total, [len(group) for group in groups.values()])
    for group, count in zip(groups.values(), counts, strict=True):
        generator.shuffle(group)
        last = {keys[index]: index for index in group}
        group.sort(key=lambda index: last[keys[index]] == index)
        chosen += group[: min(count, len(group) - 1)]
    return sorted(chosen)
