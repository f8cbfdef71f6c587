"""Rows -> bins of at most ``capacity`` tokens, so that next to nothing is padded.

First fit decreasing: from the longest row to the shortest, each goes into the first bin that has
room for it. Which lengths share a bin depends on the lengths alone, so that every epoch has as
many bins; which rows of those lengths they are is drawn anew for each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


class Packing:
    """The bins of a split. ``fill`` is the share of their tokens that is not padding."""

    def __init__(self, lengths: Numbers, capacity: int, seed: int) -> None:
        self._lengths = lengths
        self._seed = seed
        bins = first_fit_decreasing(lengths, capacity)
        self._by_bin = np.argsort(bins, kind="stable")
        counts = np.bincount(bins)
        self._ends = np.cumsum(counts)
        self.capacity = capacity
        self.bin_lengths: Numbers = np.bincount(bins, -np.sort(-lengths)).astype(np.int64)
        self.fill = float(lengths.sum() / (len(counts) * capacity))

    def __len__(self) -> int:
        return len(self._ends)

    def epoch(self, epoch: int) -> Bins:
        # The third number sets these draws apart from those of the order of the bins.
        order = np.random.default_rng((self._seed, epoch, 1)).permutation(len(self._lengths))
        order = order[np.argsort(-self._lengths[order], kind="stable")]
        return Bins(order[self._by_bin], self._ends)


class Bins:
    """The row numbers of each bin."""

    def __init__(self, rows: Numbers, ends: Numbers) -> None:
        self._rows = rows
        self._ends = ends

    def __getitem__(self, index: int) -> Numbers:
        start = int(self._ends[index - 1]) if index else 0
        return self._rows[start : int(self._ends[index])]


def first_fit_decreasing(lengths: Numbers, capacity: int) -> Numbers:
    """The bin of each row, the rows taken from the longest to the shortest.

    All rows of one length are placed at once: first fit then fills the open bins in order, each
    with as many as it has room for, and opens new ones for the rest. No row may be longer than
    ``capacity``.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    assert sizes[-1] <= capacity, "rows are cut to the capacity"
    smallest = int(sizes[0])
    numbers, room = np.zeros(0, np.int64), np.zeros(0, np.int64)  # of the bins that have room
    opened = 0
    placed = []
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        fits = room // size
        taken = np.clip(count - (np.cumsum(fits) - fits), 0, fits)
        new = _dealt(count - int(taken.sum()), capacity // size)
        numbers = np.concatenate([numbers, np.arange(opened, opened + len(new))])
        taken = np.concatenate([taken, new])
        room = np.concatenate([room, np.full(len(new), capacity)]) - taken * size
        opened += len(new)
        placed.append(np.repeat(numbers, taken))
        open_still = room >= smallest
        numbers, room = numbers[open_still], room[open_still]
    return np.concatenate(placed)


def _dealt(count: int, per_bin: int) -> Numbers:
    """``count`` as ``per_bin`` + ``per_bin`` + ... + the rest."""
    full, rest = divmod(count, per_bin)
    return np.asarray([per_bin] * full + [rest] * (rest > 0), dtype=np.int64)
