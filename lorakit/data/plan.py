"""Decide which rows make up each step, with or without packing.

The order depends only on the seed and the epoch, so a resumed run continues where it stopped.
Batches consist of units: a unit is a row, or a bin of rows that are packed together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorakit.data.encode import EncodedRow, EncodedSplit

T = TypeVar("T")
Numbers = NDArray[np.int64]
#: Indices of units.
Units = NDArray[np.int64]
#: Rows that are concatenated into one sequence; a single row if rows are not packed.
Bin = list[EncodedRow]

#: Rows are sorted by length only within windows of this many steps, to keep the order random.
_STEPS_PER_WINDOW = 50


class Packing:
    """Packs the rows of a split into bins of at most ``capacity`` tokens.

    Bins are filled by first-fit decreasing: the longest remaining row that fits is added until none
    fits. When the bin's last rows would leave a gap, the two rows that fill it best are added
    instead, which raises ``fill``, the fraction of tokens that are not padding (on WikiSQL with 512
    tokens from 97.5% to 98.9%). Which lengths share a bin depends only on the lengths, so every
    epoch has the same number of bins; among rows of equal length the choice is random per epoch.
    """

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
        # The third number separates these draws from those for the order of the bins.
        order = np.random.default_rng((self._seed, epoch, 1)).permutation(len(self._lengths))
        order = order[np.argsort(-self._lengths[order], kind="stable")]
        return Bins(order[self._by_bin], self._ends)


class Bins:
    """The row indices of each bin."""

    def __init__(self, rows: Numbers, ends: Numbers) -> None:
        self._rows = rows
        self._ends = ends

    def __getitem__(self, index: int) -> Numbers:
        start = int(self._ends[index - 1]) if index else 0
        return self._rows[start : int(self._ends[index])]


def first_fit_decreasing(lengths: Numbers, capacity: int) -> Numbers:
    """Return the bin of each row, for rows in order of decreasing length. No row may be longer
    than ``capacity``."""
    counts = np.bincount(lengths, minlength=capacity + 1)
    assert len(counts) == capacity + 1, "rows are truncated to the capacity"
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
    """The length of the next row for a bin with ``room`` tokens left; 0 if none fits. ``counts``
    are the numbers of remaining rows by length."""
    available = np.flatnonzero(counts[: room + 1])
    if not len(available):
        return 0
    longest = int(available[-1])
    if longest == room or room > 2 * longest:
        return longest
    partner = np.searchsorted(available, room - available, side="right") - 1
    firsts = available[partner >= 0]
    seconds = available[partner[partner >= 0]]
    sums = np.where((firsts == seconds) & (counts[firsts] < 2), 0, firsts + seconds)
    if not len(sums) or sums.max() <= longest:
        return longest
    best = int(np.argmax(sums))
    return int(max(firsts[best], seconds[best]))


@dataclass(frozen=True)
class Share:
    """Which micro-batches of a step a process takes: every ``world_size``-th, from ``rank`` on."""

    rank: int = 0
    world_size: int = 1

    def of(self, micro_batches: list[T]) -> list[T]:
        return micro_batches[self.rank :: self.world_size]


@dataclass(frozen=True)
class Step:
    """This process's micro-batches of an optimizer step, and the counts of the whole step.

    ``loss_count`` is the divisor of the step's loss: the weights of its trained tokens (of an
    encoder's rows or words), by default their number. ``trained_count`` is the number of these.
    ``tokens`` excludes padding.
    """

    micro_batches: list[list[Bin]]
    loss_count: float
    tokens: int
    trained_count: int

    @classmethod
    def of(cls, micro_batches: list[list[Bin]], share: Share) -> Step:
        rows = [row for batch in micro_batches for unit in batch for row in unit]
        loss_count = sum(row.loss_count for row in rows)
        tokens = sum(len(row.input_ids) for row in rows)
        trained_count = sum(row.trained_count for row in rows)
        return cls(share.of(micro_batches), loss_count, tokens, trained_count)

    @property
    def rows(self) -> list[EncodedRow]:
        return [row for batch in self.micro_batches for unit in batch for row in unit]


class StepSource(Protocol):
    """Provides the steps of a run. ``steps_per_epoch`` is None for a stream, whose length is
    unknown."""

    @property
    def steps_per_epoch(self) -> int | None: ...

    def step(self, number: int) -> Step:
        """The step ``number``, counted from 0 over the whole run."""


class Plan(Protocol):
    """Groups units into micro-batches, and these into steps. All epochs have the same number of
    steps."""

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, epoch: int) -> list[list[Units]]:
        """The micro-batches of each step of an epoch."""


@dataclass(frozen=True)
class RowPlan:
    """A fixed number of units per micro-batch. The units of a step do not depend on how
    accumulation splits it. With ``group_by_length`` the units of a step have similar lengths."""

    lengths: NDArray[np.int64]
    per_device_batch_size: int
    micro_batches_per_step: int
    seed: int
    group_by_length: bool

    @property
    def units_per_step(self) -> int:
        return self.per_device_batch_size * self.micro_batches_per_step

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
        _move_to_front(shuffled, longest)
        return [steps[i] for i in shuffled]

    def _cut(self, order: Units) -> list[Units]:
        size = self.units_per_step
        return [order[i : i + size] for i in range(0, len(order), size)]


@dataclass(frozen=True)
class TokenPlan:
    """At most ``max_tokens_per_batch`` tokens per micro-batch, including padding, and at most
    ``per_device_batch_size`` rows unless that is None.

    Rows are sorted by length, with equal lengths in random order, so every epoch has batches of the
    same sizes; only their rows and their order change. Lengths are padded to ``multiple_of``. No
    row may be longer than ``max_tokens_per_batch``.
    """

    lengths: NDArray[np.int64]
    max_tokens_per_batch: int
    per_device_batch_size: int | None
    micro_batches_per_step: int
    seed: int
    multiple_of: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._ends()) // self.micro_batches_per_step)

    def epoch(self, epoch: int) -> list[list[Units]]:
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.lengths))
        order = order[np.argsort(-self.lengths[order], kind="stable")]
        batches = np.split(order, self._ends()[:-1])
        shuffled = generator.permutation(len(batches))
        _move_to_front(shuffled, int(np.argmin(shuffled)))
        size = self.micro_batches_per_step
        return [
            [batches[i] for i in shuffled[start : start + size]]
            for start in range(0, len(shuffled), size)
        ]

    def _ends(self) -> list[int]:
        """The end of each batch among the rows in order of decreasing length."""
        lengths = -np.sort(-self.lengths)
        widths = -(-lengths // self.multiple_of) * self.multiple_of
        ends, start = [], 0
        while start < len(lengths):
            size = max(1, self.max_tokens_per_batch // int(widths[start]))
            start = min(len(lengths), start + min(size, self.per_device_batch_size or size))
            ends.append(start)
        return ends


class IndexedSteps:
    """Steps over rows that are accessible by index, by default all of them. With ``packing``, the
    plan's units are its bins; with ``drawn``, the plan numbers only these rows."""

    def __init__(
        self,
        rows: EncodedSplit,
        plan: Plan,
        packing: Packing | None = None,
        share: Share = Share(),
        drawn: Numbers | None = None,
    ) -> None:
        self._rows = rows
        self._drawn = drawn
        self._plan = plan
        self._share = share
        self._packing = packing
        self._planned: tuple[int, list[list[Units]], Bins | None] | None = None
        self.steps_per_epoch: int = plan.steps_per_epoch

    def step(self, number: int) -> Step:
        batches = self.row_numbers(number)
        numbers = np.concatenate([rows for batch in batches for rows in batch])
        return Step(
            [
                [[self._rows[int(i)] for i in rows] for rows in batch]
                for batch in self._share.of(batches)
            ],
            self._rows.loss_counts[numbers].sum().item(),
            int(self._rows.lengths[numbers].sum()),
            int(self._rows.trained_counts[numbers].sum()),
        )

    def row_numbers(self, number: int) -> list[list[Units]]:
        """The row indices of a step, over all processes: for each micro-batch, for each bin."""
        epoch, index = divmod(number, self.steps_per_epoch)
        steps, bins = self._epoch(epoch)
        batches = [
            [bins[int(unit)] if bins else np.asarray([unit]) for unit in units]
            for units in steps[index]
        ]
        if self._drawn is None:
            return batches
        return [[self._drawn[rows] for rows in batch] for batch in batches]

    def _epoch(self, epoch: int) -> tuple[list[list[Units]], Bins | None]:
        """The steps and bins of an epoch; those of the most recent epoch are cached."""
        planned = self._planned  # read and replaced atomically: a thread may prefetch the next step
        if planned is None or planned[0] != epoch:
            bins = self._packing.epoch(epoch) if self._packing else None
            planned = self._planned = (epoch, self._plan.epoch(epoch), bins)
        return planned[1:]


def pack_rows(rows: list[EncodedRow], capacity: int) -> list[Bin]:
    """Pack rows into bins, in an order that does not depend on their lengths."""
    lengths = np.asarray([len(row.input_ids) for row in rows])
    packing = Packing(lengths, capacity, seed=0)
    bins = packing.epoch(0)
    order = np.random.default_rng(len(rows)).permutation(len(packing))
    return [[rows[int(i)] for i in bins[int(index)]] for index in order]


def _move_to_front(order: Units, index: int) -> None:
    """Put the longest first, so that a run that needs too much memory fails immediately."""
    order[[0, index]] = order[[index, 0]]
