"""Stream a train split during training, without loading or copying all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from lorakit.data.file_names import split_names
from lorakit.data.files import read_rows, stream_rows
from lorakit.data.paths import PathOption, SplitFiles, find_files
from lorakit.data.rows import NAMED_ROWS, Row, UnreadRow
from lorakit.data.sources import HubName, Split, check_hub, hub_failure, joined_split
from lorakit.errors import DataError, listed

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
    Reading raises FileChanged for a file that was modified after the stream was opened."""

    head: Split
    read: Callable[[], Iterator[LocatedRow]]


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
    head_rows = min(limit or HEAD_ROWS, HEAD_ROWS)
    if path is None:
        stream = _open_hub(hub, split, head_rows)
    else:
        chosen = find_files(path, split)
        share = max(_MAX_TOTAL_HEAD_ROWS // max(len(chosen.files), 1), _MIN_HEAD_ROWS)
        most = min(head_rows, share)
        stream = _open_files(chosen, split, most, skip_bad) if chosen.files else None
    if stream is None or limit is None:
        return stream
    unlimited = stream.read
    return Stream(stream.head, lambda: islice(unlimited(), limit))


def have_same_head(fingerprint: object, other: object) -> bool:
    """Whether two fingerprints belong to streams with the same first rows, regardless of the sizes
    of their files."""
    head, _, sizes = str(fingerprint).rpartition(":")
    return head.startswith("stream:") and bool(sizes) and str(other).startswith(f"{head}:")


# Files


def _open_files(chosen: SplitFiles, split: str, head_rows: int, skip_bad: bool) -> Stream:
    stamps = [_stamp(file) for file in chosen.files]
    parts = [(file, read_rows(file, head_rows, skip_bad=skip_bad)) for file in chosen.files]
    if not any(len(part.rows) for _, part in parts):
        raise DataError(f"{listed(chosen.files)}: the split {split!r} is empty")
    rows = hashlib.sha256()
    for _, part in parts:
        rows.update(json.dumps(list(part.rows), sort_keys=True, default=str).encode())
    sizes = hashlib.sha256(json.dumps([size for size, _ in stamps]).encode())
    fingerprint = f"stream:{rows.hexdigest()}:{sizes.hexdigest()}"
    head = joined_split(split, parts, chosen, fingerprint, is_head=True)
    head = replace(head, is_head=any(len(part.rows) >= head_rows for _, part in parts))
    return Stream(head, partial(_read_files, chosen.files, stamps, head.columns, skip_bad))


def _read_files(
    files: list[Path], stamps: list[Stamp], columns: Sequence[str], skip_bad: bool
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


def _open_hub(hub: HubName | None, split: str, head_rows: int) -> Stream | None:
    import datasets

    hub, name = check_hub(hub)
    try:
        splits = datasets.load_dataset(*hub, streaming=True)
        found = next((known for known in split_names(split) if known in splits), None)
        if found is None:
            return None
        rows = list(splits[found].take(head_rows))
    except Exception as error:  # offline, gated and missing data sets raise different types
        raise hub_failure(name, error) from error
    if not rows:
        raise DataError(f"{name}: the split {split!r} is empty")
    digest = hashlib.sha256(json.dumps([name, found, rows], default=str).encode())
    source = f"{name} ({split})"
    head = Split(split, rows, source, f"stream:{digest.hexdigest()}")
    head = replace(head, is_head=len(rows) >= head_rows)

    def read() -> Iterator[LocatedRow]:
        try:
            for number, row in enumerate(splits[found], 1):
                yield LocatedRow(source, number, row)
        except Exception as error:
            raise hub_failure(name, error) from error

    return Stream(head, read)


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
