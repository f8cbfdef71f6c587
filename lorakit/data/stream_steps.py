"""Turn a stream's rows into steps: shuffle them in a buffer and tokenize them as they arrive."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.counts import Counts, OnBadRow
from lorakit.data.encode import EncodedRow, check_largest_id
from lorakit.data.examples import ChatExample, Example
from lorakit.data.plan import Bin, Share, Step
from lorakit.data.rows import Row
from lorakit.data.shares import apportion, interleaved
from lorakit.data.stream import LocatedRow, SkippedRows, Stream
from lorakit.data.tokens import RowEncoder
from lorakit.errors import DataError

#: A window is the rows of this many steps, which are tokenized together and sorted by length.
_STEPS_PER_WINDOW = 50
#: A window has at least this many rows if they are packed; fewer would not fill bins well.
_PACKED_ROWS = 1000


@dataclass(frozen=True)
class PassRow:
    """A row, and the pass over the stream, counted from 0, in which it was read."""

    located: LocatedRow
    number: int


@dataclass(frozen=True)
class WindowPart:
    """The encoded rows of consecutive rows of a window. The first ``new`` ones are of the first
    pass, as are all that ``counts`` covers; ``bad`` are rows that were skipped, and the reasons."""

    rows: list[EncodedRow]
    new: int
    counts: Counts
    bad: list[tuple[LocatedRow, str]]


#: A part, or the error that ends the stream.
Outcome = WindowPart | DataError


def only_own(outcome: Outcome) -> list[Outcome]:
    """The outcomes of all processes if there is one."""
    return [outcome]


@dataclass(frozen=True)
class StreamEncoder:
    """Tokenizes rows of a stream. ``embedding_rows`` is the model's number of embeddings."""

    to_example: Callable[[Row], Example]
    tokenizer: Any
    max_length: int
    embedding_rows: int
    class_weights: NDArray[np.float64] | None = None

    def encode(
        self, rows: Sequence[LocatedRow], skip: OnBadRow | None = None
    ) -> tuple[list[EncodedRow], Counts]:
        """Raises the same errors as ``encode_split``. With ``skip``, bad rows are skipped, and it
        is called with the index and the reason."""
        found = self._rows.encode(
            [located.row for located in rows], lambda index: str(rows[index]), skip
        )
        largest = max((int(row.input_ids.max(initial=0)) for row in found.rows), default=0)
        check_largest_id(largest, self.tokenizer, self.embedding_rows)
        labels: list[Any] = found.labels or [None] * len(found.rows)
        labels = [np.array(label) if isinstance(label, tuple) else label for label in labels]
        encoded = [
            EncodedRow(
                *(row.input_ids, row.loss_mask, row.token_type_ids, label),
                *(row.loss_weights, row.words, self.class_weights),
            )
            for row, label in zip(found.rows, labels, strict=True)
        ]
        return encoded, found.counts

    def encode_part(self, rows: Sequence[PassRow], skip_bad: bool = False) -> WindowPart:
        """Raises the same errors as ``encode``, unless bad rows are skipped."""
        bad: list[tuple[LocatedRow, str]] = []

        def encode(some: list[LocatedRow]) -> tuple[list[EncodedRow], Counts]:
            found: list[tuple[int, str]] = []
            encoded = self.encode(some, (lambda *row: found.append(row)) if skip_bad else None)
            # Without the columns, whose values may be of any type, other processes can receive it.
            bad.extend((replace(some[i], row={}), reason) for i, reason in sorted(found))
            return encoded

        first = [row.located for row in rows if not row.number]
        again = [row.located for row in rows if row.number]
        encoded, counts = encode(first) if first else ([], Counts())
        repeated = encode(again)[0] if again else []
        return WindowPart([*encoded, *repeated], len(encoded), counts, bad)

    def may_split(self, row: Row) -> bool:
        """Whether a row like this one may become several rows of tokens."""
        example = self.to_example(row)
        return isinstance(example, ChatExample) or getattr(example, "splits", False)

    @cached_property
    def _rows(self) -> RowEncoder:
        return RowEncoder(self.to_example, self.tokenizer, self.max_length)


@dataclass
class StreamSteps:
    """The endless steps of a stream: after the last row it starts again, in another order.

    The order depends only on the rows, ``seed`` and the batch sizes. ``bins`` packs the rows of a
    window; without it each row is a separate unit, and ``group_by_length`` puts rows of similar
    length into one step. With ``skipped``, bad rows are skipped.

    When a run resumes, rows of earlier steps are read but not tokenized, unless they are packed or
    the number of rows of tokens is unknown: chats and documents may be split, bad rows are skipped.
    ``rows`` (of tokens) and ``counts`` cover the windows begun, counting only the first pass.

    Every process reads all rows, which ``watch`` is called with, but tokenizes only its part of
    each window. ``gather`` returns the parts of all processes, by rank, or their errors; it is
    called by ``step``, in all processes for the same step. An error of one is raised in all.
    """

    stream: Stream
    encoder: StreamEncoder
    per_device_batch_size: int
    micro_batches_per_step: int
    seed: int
    buffer_rows: int
    group_by_length: bool
    bins: Callable[[list[EncodedRow]], list[Bin]] | None = None
    skipped: SkippedRows | None = None
    share: Share = field(default_factory=Share)
    gather: Callable[[Outcome], list[Outcome]] = only_own
    watch: Callable[[Row], None] | None = None
    steps_per_epoch: None = field(default=None, init=False)
    rows: int = field(default=0, init=False)
    counts: Counts = field(default_factory=Counts, init=False)
    _skipped_rows: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        # The reader thread has a copy: a tokenizer must not be used by two threads at once.
        tokenizer = copy.deepcopy(self.encoder.tokenizer)
        self._encoder = replace(self.encoder, tokenizer=tokenizer)
        self._next = 0
        self._source = shuffled(self.stream, self.seed, self.buffer_rows)
        self._steps: Iterator[list[Bin]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="lorakit-stream")

    @property
    def units_per_step(self) -> int:
        return self.per_device_batch_size * self.micro_batches_per_step

    @property
    def rows_read(self) -> int:
        """The number of rows of the first pass in the windows begun, tokenized or not."""
        return self._skipped_rows + self.counts.rows

    def check_has_rows(self, rows: int) -> None:
        """Raise DataError if the stream has fewer than ``rows`` rows."""
        found = sum(1 for _ in islice(self.stream.read(), rows))
        if found < rows:
            raise DataError(
                f"--resume: {self.stream.head.source}: has {found:,} rows, but the run has trained "
                f"on its first {rows:,}; hint: restore the rows, or start a new run"
            )

    def step(self, number: int) -> Step:
        """The step ``number``; numbers must not decrease between calls.

        Raises DataError with file and row for a row that cannot be read or trained on.
        """
        assert number >= self._next, "a stream is not read backwards"
        if self._steps is None:
            self._steps = self._windows(self._skip_to(number))
        while self._next <= number:
            bins = next(self._steps)
            self._next += 1
        size = self.per_device_batch_size
        return Step.of([bins[i : i + size] for i in range(0, len(bins), size)], self.share)

    def _skip_to(self, number: int) -> int:
        """Skip the complete windows before step ``number``; return how many were skipped."""
        if self.bins is not None or self.skipped is not None:
            return 0
        if self._encoder.may_split(self.stream.head.rows[0]):
            return 0
        windows = number // _STEPS_PER_WINDOW
        rows = windows * _STEPS_PER_WINDOW * self.units_per_step
        self._skipped_rows = sum(row.number == 0 for row in islice(self._source, rows))
        self._next = windows * _STEPS_PER_WINDOW
        return windows

    def _windows(self, first: int) -> Iterator[list[Bin]]:
        """Yield the steps. The next window is tokenized while the current one is trained on."""
        ahead = self._reader.submit(self._read)
        left: list[Bin] = []
        for number in count(first):
            rows = self._whole(ahead.result())
            ahead = self._reader.submit(self._read)
            units = left + (self.bins(rows) if self.bins and rows else [[row] for row in rows])
            size = self.units_per_step
            complete = len(units) // size * size
            left = units[complete:]
            yield from self._ordered(units[:complete], number)

    def _whole(self, own: Outcome) -> list[EncodedRow]:
        """Join the parts of a window and count its rows."""
        rows: list[EncodedRow] = []
        for part in self.gather(own):
            if isinstance(part, DataError):
                raise part
            for located, reason in part.bad:
                assert self.skipped is not None
                self.skipped.add(located, reason)
            rows += part.rows
            self.rows += part.new
            self.counts.add(part.counts)
        return rows

    def _read(self) -> Outcome:
        """Read a window and tokenize this process's part of it."""
        rows = _STEPS_PER_WINDOW * self.units_per_step
        if self.bins is not None:
            rows = max(rows, _PACKED_ROWS)
        try:
            window = list(islice(self._source, rows))
            return self._encode(window)
        except DataError as error:
            return error  # to be raised in all processes

    def _encode(self, window: list[PassRow]) -> WindowPart:
        if self.watch is not None:
            for row in window:
                self.watch(row.located.row)
        rank, processes = self.share.rank, self.share.world_size
        start, stop = (len(window) * k // processes for k in (rank, rank + 1))
        skip_bad = self.skipped is not None
        try:
            return self._encoder.encode_part(window[start:stop], skip_bad)
        except DataError:
            self._encoder.encode_part(window, skip_bad)  # raises what a single process would
            raise

    def _ordered(self, units: list[Bin], window: int) -> list[list[Bin]]:
        """The steps of a window; with ``group_by_length``, of rows of similar length, in random
        order."""
        size = self.units_per_step
        grouped = self.group_by_length and self.bins is None
        if grouped:
            units = sorted(units, key=lambda unit: -len(unit[0].input_ids))
        steps = [units[start : start + size] for start in range(0, len(units), size)]
        if grouped:
            order = np.random.default_rng((self.seed, window, 1)).permutation(len(steps))
            steps = [steps[index] for index in order]
        return steps


def shuffled(stream: Stream, seed: int, buffer_rows: int) -> Iterator[PassRow]:
    """Yield rows endlessly: each time a random one of the ``buffer_rows`` in the buffer, which the
    next row read replaces. Each pass over the stream is shuffled differently.

    In a mixture, each source has its share of the buffer and of the rows, however many are taken,
    and starts again when it ends.

    Raises DataError if a pass has no rows.
    """
    if not stream.parts:
        yield from _shuffled_passes(stream, (seed,), buffer_rows)
        return
    weights = [source.weight for source in stream.sources]
    buffers = apportion(buffer_rows, weights)
    sources = [
        _shuffled_passes(part, (seed, index, 2), max(1, rows))
        for index, (part, rows) in enumerate(zip(stream.parts, buffers, strict=True))
    ]
    for index in interleaved(weights):
        yield next(sources[index])


def _shuffled_passes(stream: Stream, seeds: tuple[int, ...], buffer_rows: int) -> Iterator[PassRow]:
    for number in count():
        generator = np.random.default_rng((*seeds, number))
        for located in _shuffled_pass(stream, generator, buffer_rows):
            yield PassRow(located, number)


def _shuffled_pass(
    stream: Stream, generator: np.random.Generator, buffer_rows: int
) -> Iterator[LocatedRow]:
    rows = stream.read()
    buffer = list(islice(rows, buffer_rows))
    if not buffer:
        raise DataError(f"{stream.head.source}: the split {stream.head.name!r} is empty")
    for row in rows:
        place = int(generator.integers(len(buffer)))
        yield buffer[place]
        buffer[place] = row
    for place in generator.permutation(len(buffer)):
        yield buffer[int(place)]
