"""A train split that is read while it is trained on, and neither held nor written.

The bad rows of a stream, which are left out while it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.data.file_names import split_names
from lorakit.data.files import read_rows, stream_rows
from lorakit.data.paths import PathOption, SplitFiles, find_files
from lorakit.data.rows import UnreadRow
from lorakit.data.sources import Split, hub_failure, joined_split
from lorakit.data.tokens import NAMED_ROWS
from lorakit.errors import DataError, listed

#: Size and time of change of a file.
Stamp = tuple[int, int]

#: As many rows of each file stand for all where a task looks at its rows before it reads them;
#: fewer, but some, of each of many files.
HEAD_ROWS = 200
_HEAD_ROWS_IN_ALL = 4000
_FEWEST_HEAD_ROWS = 20

Row = Mapping[str, Any]


class FileChanged(DataError):
    """A file is not what it was when the stream was opened."""


@dataclass(frozen=True)
class Located:
    """A row, and where it was read: ``FILE, row N`` from 1."""

    source: str
    number: int
    row: Row

    def __str__(self) -> str:
        return f"{self.source}, row {self.number}"


@dataclass(frozen=True)
class Stream:
    """``head`` is a split of the first rows of each file; its fingerprint is of them and, behind a
    colon, of the files' sizes. ``read`` begins anew at the first row each time it is called; each
    of its rows has the columns of ``head``, None for one that is not there, and all of its own. A
    file that changes from then on is FileChanged, between two passes over it."""

    head: Split
    read: Callable[[], Iterator[Located]]


def open_stream(
    path: PathOption,
    split: str,
    hub: tuple[str, str | None] | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Stream | None:
    """The split's rows, or the first ``limit`` of them, or None if the source has no such split.

    Raises DataError as ``load_split`` does, and while it is read for a row that is not valid.
    """
    head_rows = min(limit or HEAD_ROWS, HEAD_ROWS)
    if path is None:
        stream = _open_hub(hub, split, head_rows)
    else:
        there = find_files(path, split)
        share = max(_HEAD_ROWS_IN_ALL // max(len(there.files), 1), _FEWEST_HEAD_ROWS)
        most = min(head_rows, share)
        stream = _open_files(there, split, most, skip_bad) if there.files else None
    if stream is None or limit is None:
        return stream
    unlimited = stream.read
    return Stream(stream.head, lambda: islice(unlimited(), limit))


def _open_files(there: SplitFiles, split: str, head_rows: int, skip_bad: bool) -> Stream:
    stamps = [_stamp(file) for file in there.files]
    parts = [(file, read_rows(file, head_rows, skip_bad=skip_bad)) for file in there.files]
    if not any(len(part.rows) for _, part in parts):
        raise DataError(f"{listed(there.files)}: the split {split!r} is empty")
    begun = hashlib.sha256()
    for _, part in parts:
        begun.update(json.dumps(list(part.rows), sort_keys=True, default=str).encode())
    sizes = hashlib.sha256(json.dumps([size for size, _ in stamps]).encode())
    fingerprint = f"stream:{begun.hexdigest()}:{sizes.hexdigest()}"
    head = joined_split(split, parts, there, fingerprint, begun=True)
    head = replace(head, begun=any(len(part.rows) >= head_rows for _, part in parts))
    return Stream(head, partial(_read_files, there.files, stamps, head.columns, skip_bad))


def same_beginning(fingerprint: object, other: object) -> bool:
    """Whether two fingerprints are of streams that begin alike, whatever the sizes of their
    files."""
    begun, _, sizes = str(fingerprint).rpartition(":")
    return begun.startswith("stream:") and bool(sizes) and str(other).startswith(f"{begun}:")


def _read_files(
    files: list[Path], stamps: list[Stamp], columns: Sequence[str], skip_bad: bool
) -> Iterator[Located]:
    blank = dict.fromkeys(columns)
    for file, stamp in zip(files, stamps, strict=True):
        _check_unchanged(file, stamp)
        for number, row in enumerate(stream_rows(file, skip_bad), 1):
            whole = row if isinstance(row, UnreadRow) else {**blank, **row}
            yield Located(str(file), number, whole)
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


def _open_hub(hub: tuple[str, str | None] | None, split: str, head_rows: int) -> Stream | None:
    if hub is None:
        raise DataError("task.path: null, but this task has no data set on the Hub; give a path")
    import datasets

    name = "/".join(part for part in hub if part)
    try:
        splits = datasets.load_dataset(*hub, streaming=True)
        found = next((known for known in split_names(split) if known in splits), None)
        if found is None:
            return None
        rows = list(splits[found].take(head_rows))
    except Exception as error:  # offline, gated or missing: each comes as another type
        raise hub_failure(name, error) from error
    if not rows:
        raise DataError(f"{name}: the split {split!r} is empty")
    digest = hashlib.sha256(json.dumps([name, found, rows], default=str).encode())
    source = f"{name} ({split})"
    head = Split(split, rows, source, f"stream:{digest.hexdigest()}")
    head = replace(head, begun=len(rows) >= head_rows)

    def read() -> Iterator[Located]:
        try:
            for number, row in enumerate(splits[found], 1):
                yield Located(source, number, row)
        except Exception as error:
            raise hub_failure(name, error) from error

    return Stream(head, read)


class SkippedRows:
    """Counts each row once, however often the stream begins anew; ``say`` gets the first ones."""

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name = name
        self._say = say
        self._seen: set[tuple[str, int]] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, row: Located, reason: str) -> None:
        place = (row.source, row.number)
        if place in self._seen:
            return
        self._seen.add(place)
        if len(self) <= NAMED_ROWS:
            self._say(f"{self._name}: row skipped (task.on_bad_row: skip): {row}: {reason}")

    def note(self) -> str | None:
        """How many there were; None for none."""
        if not self._seen:
            return None
        rows = f"{len(self):,} row{'s' * (len(self) > 1)}"
        return f"{self._name}: {rows} skipped in all (task.on_bad_row: skip)"
