"""A stream's rows -> steps: shuffled in a buffer, and tokenised as they come."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any

import numpy as np

from lorakit.data.encode import EncodedRow, check_largest_id
from lorakit.data.examples import ChatExample, Example
from lorakit.data.plan import Bin, Step
from lorakit.data.stream import Located, SkippedRows, Stream
from lorakit.data.tokens import Counts, OnBadRow, TokenRow, encode_rows
from lorakit.errors import DataError

#: So many steps' worth of rows are tokenised at once, and sorted by length among themselves.
_STEPS_PER_WINDOW = 50
#: Fewer do not fill bins well.
_PACKED_ROWS = 1000


@dataclass(frozen=True)
class Passed:
    """A row of the pass ``number``, from 0."""

    located: Located
    number: int


@dataclass(frozen=True)
class StreamEncoder:
    """What makes tokens of a row; ``embedding_rows`` are the model's."""

    to_example: Callable[[Mapping[str, Any]], Example]
    tokenizer: Any
    max_length: int
    embedding_rows: int

    def encode(
        self, rows: Sequence[Located], skip: OnBadRow | None = None
    ) -> tuple[list[EncodedRow], Counts]:
        """Raises DataError with file and row as ``encode_split`` does; with ``skip``, which gets
        the index and the reason, a bad row is left out."""
        found = encode_rows(
            [located.row for located in rows],
            lambda index: str(rows[index]),
            self.to_example,
            self.tokenizer,
            self.max_length,
            skip,
        )
        largest = max((max(row.input_ids, default=0) for row in found.rows), default=0)
        check_largest_id(largest, self.tokenizer, self.embedding_rows)
        labels: list[Any] = found.labels or [None] * len(found.rows)
        encoded = [_row(row, label) for row, label in zip(found.rows, labels, strict=True)]
        return encoded, found.counts

    def encode_pass(
        self, rows: Sequence[Passed], skip: Callable[[Located, str], None] | None = None
    ) -> tuple[list[EncodedRow], int, Counts]:
        """The tokens of all rows, how many of them are of the first pass, and the counts of those.

        Raises DataError as ``encode`` does; with ``skip`` a bad row is left out and given to it.
        """

        def encode(some: list[Located]) -> tuple[list[EncodedRow], Counts]:
            if skip is None:
                return self.encode(some)
            return self.encode(some, lambda index, reason: skip(some[index], reason))

        first = [row.located for row in rows if not row.number]
        again = [row.located for row in rows if row.number]
        encoded, counts = encode(first) if first else ([], Counts())
        repeated = encode(again)[0] if again else []
        return [*encoded, *repeated], len(encoded), counts

    def may_split(self, row: Mapping[str, Any]) -> bool:
        """Whether a row like this one may become several rows of tokens."""
        return isinstance(self.to_example(row), ChatExample)


def _row(row: TokenRow, label: int | float | None) -> EncodedRow:
    types = None if row.token_type_ids is None else np.asarray(row.token_type_ids, np.int8)
    input_ids = np.asarray(row.input_ids, np.int32)
    return EncodedRow(input_ids, np.asarray(row.loss_mask, np.bool_), types, label)


@dataclass
class StreamSteps:
    """The steps of a stream without end: after its last row it begins anew, in another order.

    The order is a function of the rows, ``seed`` and the sizes alone. ``bins`` packs the rows of a
    window; without it each row is a unit of its own, ``group_by_length`` puts rows of like length
    into a step, and rows that a jump passes over are read and not tokenised, unless a row may
    become several or, with ``skipped``, none: there bad rows are left out. ``rows`` (of tokens) and
    ``counts`` are of the windows begun, without the rows of later passes, which were counted in the
    first.
    """

    stream: Stream
    encoder: StreamEncoder
    per_device_batch_size: int
    gradient_accumulation_steps: int
    seed: int
    buffer_rows: int
    group_by_length: bool
    bins: Callable[[list[EncodedRow]], list[Bin]] | None = None
    skipped: SkippedRows | None = None
    steps_per_epoch: None = field(default=None, init=False)
    rows: int = field(default=0, init=False)
    _passed: int = field(default=0, init=False)
    counts: Counts = field(default_factory=Counts, init=False)

    def __post_init__(self) -> None:
        # The reader's own: a tokenizer that two threads use at once fails.
        tokenizer = copy.deepcopy(self.encoder.tokenizer)
        self._encoder = replace(self.encoder, tokenizer=tokenizer)
        self._next = 0
        self._source = shuffled(self.stream, self.seed, self.buffer_rows)
        self._steps: Iterator[list[Bin]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="lorakit-stream")

    @property
    def units_per_step(self) -> int:
        return self.per_device_batch_size * self.gradient_accumulation_steps

    @property
    def rows_read(self) -> int:
        """The stream's rows in the windows begun, those passed over among them."""
        return self._passed + self.counts.rows

    def check_holds(self, rows: int) -> None:
        """Raise DataError if one pass over the stream has fewer rows."""
        found = sum(1 for _ in islice(self.stream.read(), rows))
        if found < rows:
            raise DataError(
                f"--resume: {self.stream.head.source}: holds {found:,} rows, and the run has "
                f"trained on its first {rows:,}; put the rows back, or start a new run"
            )

    def step(self, number: int) -> Step:
        """The step ``number``, which may not be before one that was handed out.

        Raises DataError with file and row for one that cannot be read or trained on.
        """
        assert number >= self._next, "a stream is not read backwards"
        if self._steps is None:
            self._steps = self._windows(self._skip(number))
        while self._next <= number:
            bins = next(self._steps)
            self._next += 1
        size = self.per_device_batch_size
        return Step([bins[i : i + size] for i in range(0, len(bins), size)])

    def _skip(self, number: int) -> int:
        """Pass over the whole windows before step ``number``: how many there were."""
        if self.bins is not None or self.skipped is not None:
            return 0
        if self._encoder.may_split(self.stream.head.rows[0]):
            return 0
        windows = number // _STEPS_PER_WINDOW
        rows = windows * _STEPS_PER_WINDOW * self.units_per_step
        self._passed = rows
        next(islice(self._source, rows, rows), None)
        self._next = windows * _STEPS_PER_WINDOW
        return windows

    def _windows(self, first: int) -> Iterator[list[Bin]]:
        """The steps one after another. The next window is made while the last one is trained on."""
        ahead = self._reader.submit(self._read)
        left: list[Bin] = []
        for number in count(first):
            rows, new, counts, bad = ahead.result()
            for located, reason in bad:
                assert self.skipped is not None
                self.skipped.add(located, reason)
            ahead = self._reader.submit(self._read)
            self.rows += new
            self.counts.add(counts)
            units = left + (self.bins(rows) if self.bins and rows else [[row] for row in rows])
            size = self.units_per_step
            whole = len(units) // size * size
            left = units[whole:]
            yield from self._ordered(units[:whole], number)

    def _read(self) -> tuple[list[EncodedRow], int, Counts, list[tuple[Located, str]]]:
        rows = _STEPS_PER_WINDOW * self.units_per_step
        if self.bins is not None:
            rows = max(rows, _PACKED_ROWS)
        bad: list[tuple[Located, str]] = []

        def skip(located: Located, reason: str) -> None:
            bad.append((located, reason))

        window = list(islice(self._source, rows))
        found = self._encoder.encode_pass(window, skip if self.skipped is not None else None)
        return *found, bad

    def _ordered(self, units: list[Bin], window: int) -> list[list[Bin]]:
        """The steps of a window; with ``group_by_length`` each of like lengths, in random order."""
        size = self.units_per_step
        grouped = self.group_by_length and self.bins is None
        if grouped:
            units = sorted(units, key=lambda unit: -len(unit[0].input_ids))
        steps = [units[start : start + size] for start in range(0, len(units), size)]
        if grouped:
            order = np.random.default_rng((self.seed, window, 1)).permutation(len(steps))
            steps = [steps[index] for index in order]
        return steps


def shuffled(stream: Stream, seed: int, buffer_rows: int) -> Iterator[Passed]:
    """The rows without end. Of ``buffer_rows`` rows a random one is next, and the row read next
    takes its place; each pass over the stream is shuffled anew.

    Raises DataError if a pass has no rows.
    """
    for number in count():
        generator = np.random.default_rng((seed, number))
        for located in _one_pass(stream, generator, buffer_rows):
            yield Passed(located, number)


def _one_pass(
    stream: Stream, generator: np.random.Generator, buffer_rows: int
) -> Iterator[Located]:
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
