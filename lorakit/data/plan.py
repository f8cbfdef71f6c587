"""Rows -> bins of at most ``capacity`` tokens, so that next to nothing is padded.

First fit decreasing, seen from a bin: of the rows that are left it takes the longest that fits, and
again, until none does. Before that leaves a gap, a bin is closed with the two rows that fill it
best: on WikiSQL at 512 tokens the bins are then 98.9% full, and 97.5% without. Which lengths share
a bin depends on the lengths alone, so that every epoch has as many bins; which rows of those
lengths they are is drawn anew for each.

Which rows make a step.

The order is a function of seed and epoch alone, so a resumed run takes up where it was. What is
batched is a unit: a row, or a bin of rows that are packed together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lorakit.data.encode import EncodedRow, EncodedSplit

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
    """The bin of each row, the rows taken from the longest to the shortest. No row may be longer
    than ``capacity``."""
    counts = np.bincount(lengths, minlength=capacity + 1)
    assert len(counts) == capacity + 1, "rows are cut to the capacity"
    sizes = np.empty(len(lengths), np.int64)
    bins = np.empty(len(lengths), np.int64)
    placed = number = 0
    while placed < len(lengths):
        room = capacity
        while size := _next_size(counts, room):
            counts[size] -= 1
            room -= size
            sizes[placed], bins[placed] = size, number
            placed += 1
        number += 1
    return bins[np.argsort(-sizes, kind="stable")]


def _next_size(counts: Numbers, room: int) -> int:
    """The length of the row that goes next into a bin with ``room``; 0 if none fits. ``counts`` are
    the rows that are left by length."""
    there = np.flatnonzero(counts[: room + 1])
    if not len(there):
        return 0
    longest = int(there[-1])
    if longest == room or room > 2 * longest:
        return longest
    partner = np.searchsorted(there, room - there, side="right") - 1
    firsts = there[partner >= 0]
    seconds = there[partner[partner >= 0]]
    sums = np.where((firsts == seconds) & (counts[firsts] < 2), 0, firsts + seconds)
    if not len(sums) or sums.max() <= longest:
        return longest
    best = int(np.argmax(sums))
    return int(max(firsts[best], seconds[best]))


#: Rows are sorted by length within this many steps' worth, as a compromise with randomness.
_STEPS_PER_WINDOW = 50

Units = NDArray[np.int64]
#: Rows that stand one behind another in one sequence; unpacked, a single row.
Bin = list[EncodedRow]


@dataclass(frozen=True)
class Step:
    """One optimizer step. ``tokens`` counts without padding."""

    micro_batches: list[list[Bin]]

    @property
    def loss_count(self) -> int:
        """The divisor of the step's loss: its trained tokens, or its rows for an encoder."""
        return sum(
            1 if row.label is not None else int(row.loss_mask[1:].sum()) for row in self.rows
        )

    @property
    def tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def rows(self) -> list[EncodedRow]:
        return [row for batch in self.micro_batches for unit in batch for row in unit]


class StepSource(Protocol):
    """``steps_per_epoch`` is None for a stream, whose end nobody knows."""

    @property
    def steps_per_epoch(self) -> int | None: ...

    def step(self, number: int) -> Step:
        """The step ``number``, from 0 over the whole run."""


class Plan(Protocol):
    """How units make batches, and batches steps; every epoch has as many steps as the first."""

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, epoch: int) -> list[list[Units]]:
        """The micro-batches of each step of an epoch."""


@dataclass(frozen=True)
class RowPlan:
    """So many units a micro-batch; the units of a step do not depend on how accumulation splits
    it. With ``group_by_length`` those of a step are of like length."""

    lengths: NDArray[np.int64]
    per_device_batch_size: int
    gradient_accumulation_steps: int
    seed: int
    group_by_length: bool

    @property
    def units_per_step(self) -> int:
        return self.per_device_batch_size * self.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.units_per_step)

    def epoch(self, epoch: int) -> list[list[Units]]:
        size = self.per_device_batch_size
        return [[s[i : i + size] for i in range(0, len(s), size)] for s in self._steps(epoch)]

    def _steps(self, epoch: int) -> list[Units]:
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.lengths))
        if not self.group_by_length:
            return self._cut(order)
        window = self.units_per_step * _STEPS_PER_WINDOW
        sorted_windows = [
            part[np.argsort(-self.lengths[part], kind="stable")]
            for part in (order[i : i + window] for i in range(0, len(order), window))
        ]
        steps = self._cut(np.concatenate(sorted_windows))
        shuffled = generator.permutation(len(steps))
        longest = int(np.argmax([self.lengths[steps[i]].max() for i in shuffled]))
        _first(shuffled, longest)
        return [steps[i] for i in shuffled]

    def _cut(self, order: Units) -> list[Units]:
        size = self.units_per_step
        return [order[i : i + size] for i in range(0, len(order), size)]


@dataclass(frozen=True)
class TokenPlan:
    """At most so many tokens a micro-batch, padding included, and at most
    ``per_device_batch_size`` rows where that is not None.

    Rows go by length, equal ones in random order: so the sizes of an epoch's batches are always
    the same, and only their rows and their order change. ``multiple_of`` is what lengths are
    padded to. A row may not be longer than the budget.
    """

    lengths: NDArray[np.int64]
    max_tokens_per_batch: int
    per_device_batch_size: int | None
    gradient_accumulation_steps: int
    seed: int
    multiple_of: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._ends()) // self.gradient_accumulation_steps)

    def epoch(self, epoch: int) -> list[list[Units]]:
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.lengths))
        order = order[np.argsort(-self.lengths[order], kind="stable")]
        batches = np.split(order, self._ends()[:-1])
        shuffled = generator.permutation(len(batches))
        _first(shuffled, int(np.argmin(shuffled)))
        size = self.gradient_accumulation_steps
        return [
            [batches[i] for i in shuffled[start : start + size]]
            for start in range(0, len(shuffled), size)
        ]

    def _ends(self) -> list[int]:
        """Where each batch ends in the rows from the longest to the shortest."""
        lengths = -np.sort(-self.lengths)
        widths = -(-lengths // self.multiple_of) * self.multiple_of
        ends, start = [], 0
        while start < len(lengths):
            size = max(1, self.max_tokens_per_batch // int(widths[start]))
            start = min(len(lengths), start + min(size, self.per_device_batch_size or size))
            ends.append(start)
        return ends


class IndexedSteps:
    """The steps of rows that can be asked for by number. With ``packing`` the plan's units are its
    bins."""

    def __init__(self, rows: EncodedSplit, plan: Plan, packing: Packing | None = None) -> None:
        self._rows = rows
        self._plan = plan
        self._packing = packing
        self._epoch = -1
        self._steps: list[list[Units]] = []
        self.steps_per_epoch: int = plan.steps_per_epoch

    def step(self, number: int) -> Step:
        return Step(
            [
                [[self._rows[int(i)] for i in rows] for rows in batch]
                for batch in self.row_numbers(number)
            ]
        )

    def row_numbers(self, number: int) -> list[list[Units]]:
        """The rows of the step: of each micro-batch, of each bin."""
        epoch, index = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._steps, self._epoch = self._plan.epoch(epoch), epoch
            self._bins = self._packing.epoch(epoch) if self._packing else None
        bins = self._bins
        return [
            [bins[int(unit)] if bins else np.asarray([unit]) for unit in units]
            for units in self._steps[index]
        ]


def pack_rows(rows: list[EncodedRow], capacity: int) -> list[Bin]:
    """The rows in bins, and the bins in an order that says nothing of their lengths."""
    lengths = np.asarray([len(row.input_ids) for row in rows])
    packing = Packing(lengths, capacity, seed=0)
    bins = packing.epoch(0)
    order = np.random.default_rng(len(rows)).permutation(len(packing))
    return [[rows[int(i)] for i in bins[int(index)]] for index in order]


def _first(order: Units, index: int) -> None:
    """What is longest goes first: if memory is short, it shows at once."""
    order[[0, index]] = order[[index, 0]]
