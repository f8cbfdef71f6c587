"""Mix several sources of rows by weight.

An epoch draws rows from each source in proportion to its weight, none of them twice, and ends when
a source has no more rows. The next epoch goes on with the rows that its predecessors have not drawn
yet; once a source has none left, it starts again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lorakit.data.encode import EncodedSplit
from lorakit.data.plan import IndexedSteps, Numbers, Packing, Plan, Share, Step, Units
from lorakit.data.shares import apportion, exact
from lorakit.data.sources import SourceRows
from lorakit.data.stream import Stream
from lorakit.errors import DataError


def epoch_rows(sources: Sequence[SourceRows]) -> list[int]:
    """The number of rows that an epoch draws from each source.

    Raises DataError for a source that is drawn less than once.
    """
    weights = [exact(source.weight) for source in sources]
    shortest = min(range(len(sources)), key=lambda i: sources[i].rows / weights[i])
    total = int(sources[shortest].rows / weights[shortest] * sum(weights))
    counts = apportion(total, [source.weight for source in sources])
    if counts[shortest] < sources[shortest].rows:  # its part was rounded down
        larger = apportion(total + 1, [source.weight for source in sources])
        if all(count <= source.rows for source, count in zip(sources, larger, strict=True)):
            counts = larger
    for source, count in zip(sources, counts, strict=True):
        if count == 0:
            end = sources[shortest]
            raise DataError(
                f"task.path: weight {source.weight:g} of {source.label}: an epoch ends with all "
                f"{end.rows:,} rows of {end.label} (weight {end.weight:g}), before it draws one "
                f"row; allowed: at least {end.weight / end.rows:g}"
            )
    return counts


def weights_note(name: str, stream: Stream | None, sources: Sequence[SourceRows]) -> str | None:
    """Say how the rows of the split ``name`` are drawn from the ``stream``, or else the
    ``sources``; None if they are not weighted. Raises DataError for a source that is drawn less
    than once in an epoch."""
    if stream is not None and stream.parts:
        return _stream_note(name, stream)
    return _mixture_note(name, sources) if sources else None


def _mixture_note(name: str, sources: Sequence[SourceRows]) -> str:
    """Say how many rows of each source an epoch of the split ``name`` draws."""
    counts = epoch_rows(sources)
    total = sum(counts)
    drawn = ", ".join(
        f"{count:,} of {source.rows:,} from {source.label} ({count / total:.1%})"
        for source, count in zip(sources, counts, strict=True)
    )
    return f"{name}: an epoch draws {total:,} rows by weight: {drawn}"


def mixture_table(sources: Sequence[SourceRows]) -> list[dict[str, Any]]:
    """The sources as ``run.json`` records them, with the number of rows that an epoch draws."""
    return [
        {"source": s.label, "weight": s.weight, "rows": s.rows, "rows_per_epoch": count}
        for s, count in zip(sources, epoch_rows(sources), strict=True)
    ]


def _stream_note(name: str, stream: Stream) -> str:
    """Say how many rows of each source of a stream are drawn."""
    total = sum(exact(source.weight) for source in stream.sources)
    shares = ", ".join(
        f"{float(exact(source.weight) / total):.1%} from {source.label}"
        for source in stream.sources
    )
    return f"{name}: rows are drawn by weight, and a source starts again at its end: {shares}"


class Mixture:
    """Draws the rows of each epoch from ``sources``, which are consecutive in their split.

    The rows of a source are put into a random order once, and each epoch takes the next ones.
    """

    def __init__(self, sources: Sequence[SourceRows], seed: int) -> None:
        self.counts = epoch_rows(sources)
        self._orders: list[Numbers] = []
        start = 0
        for index, source in enumerate(sources):
            # The third number separates these draws from those of ``Packing``.
            generator = np.random.default_rng((seed, index, 2))
            self._orders.append(start + generator.permutation(source.rows))
            start += source.rows
        self.rows = start

    def epoch(self, epoch: int) -> Numbers:
        """The indices of the rows that an epoch draws."""
        drawn = [
            order[(epoch * count + np.arange(count)) % len(order)]
            for order, count in zip(self._orders, self.counts, strict=True)
        ]
        return np.concatenate(drawn)


class MixedSteps:
    """The steps of a mixture. ``plan`` groups rows of the lengths that it is given.

    Epochs of packed rows, and those of batches with a number of tokens, differ by a few steps;
    ``steps_per_epoch`` is the number of the first one.
    """

    def __init__(
        self,
        rows: EncodedSplit,
        mixture: Mixture,
        plan: Callable[[Numbers], tuple[Plan, Packing | None]],
        share: Share,
    ) -> None:
        self._rows, self._mixture, self._plan, self._share = rows, mixture, plan, share
        self._planned: tuple[int, IndexedSteps] | None = None
        self._ends: list[int] = []
        self.steps_per_epoch: int = self._epoch(0).steps_per_epoch

    def step(self, number: int) -> Step:
        steps, own = self._place(number)
        return steps.step(own)

    def row_numbers(self, number: int) -> list[list[Units]]:
        """The row indices of a step, as those of ``IndexedSteps``."""
        steps, own = self._place(number)
        return steps.row_numbers(own)

    def _place(self, number: int) -> tuple[IndexedSteps, int]:
        """The steps of the epoch of step ``number``, and its number among them."""
        while not self._ends or number >= self._ends[-1]:
            end = self._ends[-1] if self._ends else 0
            self._ends.append(end + self._epoch(len(self._ends)).steps_per_epoch)
        epoch = bisect_right(self._ends, number)
        steps = self._epoch(epoch)
        start = self._ends[epoch - 1] if epoch else 0
        return steps, epoch * steps.steps_per_epoch + number - start

    def _epoch(self, epoch: int) -> IndexedSteps:
        """The steps of an epoch; those of the most recent one are kept."""
        planned = self._planned  # read and replaced atomically: a thread may prefetch the next step
        if planned is None or planned[0] != epoch:
            drawn = self._mixture.epoch(epoch)
            plan, packing = self._plan(self._rows.lengths[drawn])
            steps = IndexedSteps(self._rows, plan, packing, self._share, drawn)
            planned = self._planned = (epoch, steps)
        return planned[1]
