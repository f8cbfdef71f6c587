"""Stream a training split during training, without loading or copying all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lorakit.data.files import read_rows, stream_rows
from lorakit.data.hub import HubName, HubSplit, task_data_set
from lorakit.data.paths import Source, find_sources
from lorakit.data.rows import NAMED_ROWS, Row, UnreadRow
from lorakit.data.sources import (
    SourceRows,
    Split,
    combined,
    joined_split,
    limits,
    mixed_sources,
)
from lorakit.data.tables import FileRows
from lorakit.errors import DataError, listed
from lorakit.recipe.data_path import PathOption

#: Size and modification time of a file.
Stamp = tuple[int, int]

#: How many of each file's first rows a task inspects before training; fewer if there are many
#: files, but never below ``_MIN_HEAD_ROWS``.
HEAD_ROWS = 200
_MAX_TOTAL_HEAD_ROWS = 4000
_MIN_HEAD_ROWS = 20


class FileChanged(DataError):
    """A file has changed since the stream was opened."""


@dataclass(frozen=True)
class LocatedRow:
    """A row and its location, ``FILE, row N``, counted from 1."""

    source: str
    number: int
    row: Row

    def __str__(self) -> str:
        return f"{self.source}, row {self.number}"


@dataclass(frozen=True)
class Stream:
    """``head`` is a split of the first rows of each file; its fingerprint covers these rows and,
    after a colon, the sizes of the files. Each call of ``read`` starts again at the first row. A
    row has the columns of ``head``, with None where it lacks one, and any additional columns.
    Reading raises FileChanged for a file that was modified after the stream was opened. The rows
    of a mixture are those of ``parts``, to be mixed in proportion to the weights of ``sources``,
    whose numbers of rows are those of ``head``."""

    head: Split
    read: Callable[[], Iterator[LocatedRow]]
    parts: tuple[Stream, ...] = ()
    sources: tuple[SourceRows, ...] = ()


def open_stream(
    path: PathOption,
    split: str,
    hub: HubName | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Stream | None:
    """Open a split, or its first ``limit`` rows; None if the source has no such split.

    Raises the same errors as ``load_split``; for an invalid row, only when it is read.
    """
    if path is None:
        return _open_hub(task_data_set(hub), split, limit)
    sources = find_sources(path, split)
    return _open_sources(sources, split, limit, skip_bad) if sources else None


def have_same_head(fingerprint: object, other: object) -> bool:
    """Whether two fingerprints belong to streams with the same first rows, regardless of the sizes
    of their files."""
    head, _, sizes = str(fingerprint).rpartition(":")
    return head.startswith("stream:") and bool(sizes) and str(other).startswith(f"{head}:")


# Sources


@dataclass(frozen=True)
class _Opened:
    """The first rows of the files of a source, their sizes, and a function that reads all rows,
    given the columns that each row must have."""

    heads: list[tuple[Path, FileRows]]
    sizes: list[int]
    read: Callable[[Sequence[str]], Iterator[LocatedRow]]


def _open_sources(
    sources: Sequence[Source], split: str, limit: int | None, skip_bad: bool
) -> Stream:
    files = combined(sources)
    share = max(_MAX_TOTAL_HEAD_ROWS // len(files.files), _MIN_HEAD_ROWS)
    head_rows = min(limit or HEAD_ROWS, HEAD_ROWS, share)
    opened = [_open_source(source, split, head_rows, skip_bad) for source in sources]
    heads = [head for source in opened for head in source.heads]
    if not any(len(part.rows) for _, part in heads):
        raise DataError(f"{listed(files.files)}: the split {split!r} is empty")
    counts = [sum(len(part.rows) for _, part in source.heads) for source in opened]
    mixed = mixed_sources(sources, counts)
    fingerprint = _fingerprint(opened, [source.weight for source in mixed])
    head = joined_split(split, heads, files, fingerprint, is_head=True)
    head = replace(head, is_head=any(len(part.rows) >= head_rows for _, part in heads))
    parts = tuple(
        Stream(head, partial(_read_first, source, head.columns, own))
        for source, own in zip(opened, limits(sources, limit), strict=True)
    )
    if mixed:
        return Stream(head, lambda: _chained(parts), parts, mixed)
    return Stream(head, lambda: islice(_chained(parts), limit))


def _read_first(source: _Opened, columns: Sequence[str], limit: int | None) -> Iterator[LocatedRow]:
    return islice(source.read(columns), limit)


def _chained(parts: Sequence[Stream]) -> Iterator[LocatedRow]:
    return chain.from_iterable(part.read() for part in parts)


def _fingerprint(opened: Sequence[_Opened], weights: Sequence[float]) -> str:
    rows = hashlib.sha256()
    for source in opened:
        for _, part in source.heads:
            rows.update(json.dumps(list(part.rows), sort_keys=True, default=str).encode())
    if weights:
        rows.update(json.dumps(weights).encode())
    sizes = [size for source in opened for size in source.sizes]
    return f"stream:{rows.hexdigest()}:{hashlib.sha256(json.dumps(sizes).encode()).hexdigest()}"


def _open_source(source: Source, split: str, head_rows: int, skip_bad: bool) -> _Opened:
    files = source.found.files
    if source.hub is not None:
        rows = source.hub.load(split, streaming=True)
        head = FileRows(_hub_head(source.hub, rows, head_rows), "")
        return _Opened([(files[0], head)], [], partial(_read_hub, source.hub, split, rows))
    stamps = [_stamp(file) for file in files]
    heads = [(file, read_rows(file, head_rows, skip_bad=skip_bad)) for file in files]
    read = partial(_read_files, files, stamps, skip_bad)
    return _Opened(heads, [size for size, _ in stamps], read)


def _read_files(
    files: list[Path], stamps: list[Stamp], skip_bad: bool, columns: Sequence[str]
) -> Iterator[LocatedRow]:
    blank = dict.fromkeys(columns)
    for file, stamp in zip(files, stamps, strict=True):
        _check_unchanged(file, stamp)
        for number, row in enumerate(stream_rows(file, skip_bad), 1):
            filled = row if isinstance(row, UnreadRow) else {**blank, **row}
            yield LocatedRow(str(file), number, filled)
        _check_unchanged(file, stamp)


def _stamp(file: Path) -> Stamp:
    try:
        found = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return found.st_size, found.st_mtime_ns


def _check_unchanged(file: Path, stamp: Stamp) -> None:
    if _stamp(file) != stamp:
        raise FileChanged(f"{file}: the file has changed since it was first read")


# The Hub


def _open_hub(hub: HubSplit, split: str, limit: int | None) -> Stream | None:
    rows = hub.load(split, streaming=True)
    if rows is None:
        return None
    head_rows = min(limit or HEAD_ROWS, HEAD_ROWS)
    first = _hub_head(hub, rows, head_rows)
    label = hub.label(split)
    if not first:
        raise DataError(f"{label}: the split {split!r} is empty")
    digest = hashlib.sha256(json.dumps([label, first], default=str).encode())
    head = Split(split, first, label, f"stream:{digest.hexdigest()}")
    head = replace(head, is_head=len(first) >= head_rows)
    return Stream(head, lambda: islice(_read_hub(hub, split, rows, ()), limit))


def _hub_head(hub: HubSplit, rows: Any, count: int) -> list[Row]:
    try:
        return list(rows.take(count))
    except Exception as error:  # a dataset that cannot be read raises errors of many types
        raise hub.failure(error) from error


def _read_hub(hub: HubSplit, split: str, rows: Any, columns: Sequence[str]) -> Iterator[LocatedRow]:
    blank = dict.fromkeys(columns)
    try:
        for number, row in enumerate(rows, 1):
            yield LocatedRow(hub.label(split), number, {**blank, **row})
    except Exception as error:
        raise hub.failure(error) from error


# Bad rows


class SkippedRows:
    """Counts the bad rows of a stream, each once even if the stream is read repeatedly; the first
    ones are reported to ``say``."""

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name = name
        self._say = say
        self._seen: set[tuple[str, int]] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, row: LocatedRow, reason: str) -> None:
        place = (row.source, row.number)
        if place in self._seen:
            return
        self._seen.add(place)
        if len(self) <= NAMED_ROWS:
            self._say(f"{self._name}: row skipped (task.on_bad_row: skip): {row}: {reason}")

    def note(self) -> str | None:
        """Describe how many rows were skipped; None if there were none."""
        if not self._seen:
            return None
        rows = f"{len(self):,} row{'s' * (len(self) > 1)}"
        return f"{self._name}: {rows} skipped in total (task.on_bad_row: skip)"
