"""A train split that is read while it is trained on, and neither held nor written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.data.files import delimited_rows, json_rows, read_rows
from lorakit.data.parquet import parquet_rows
from lorakit.data.rows import JoinedRows, column_names
from lorakit.data.sources import (
    PathOption,
    Split,
    hub_failure,
    shared_columns,
    split_files,
    split_names,
)
from lorakit.errors import DataError

#: Size and time of change of a file.
Stamp = tuple[int, int]

#: As many rows of each file stand for all where a task looks at its rows before it reads them.
HEAD_ROWS = 200

Row = Mapping[str, Any]


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
    """``head`` is a split of the first rows of each file; its fingerprint is of them and of the
    files' sizes. ``read`` begins anew at the first row each time it is called; each of its rows
    has the columns of ``head``, and a key that first stands further on is not read. A file that
    changes from then on is a DataError, between two passes over it."""

    head: Split
    read: Callable[[], Iterator[Located]]


def open_stream(
    path: PathOption,
    split: str,
    hub: tuple[str, str | None] | None = None,
    limit: int | None = None,
) -> Stream | None:
    """The split's rows, or the first ``limit`` of them, or None if the source has no such split.

    Raises DataError as ``load_split`` does, and while it is read for a row that is not valid.
    """
    head_rows = min(limit or HEAD_ROWS, HEAD_ROWS)
    if path is None:
        stream = _open_hub(hub, split, head_rows)
    else:
        files = split_files(path, split)
        stream = _open_files(files, split, head_rows) if files else None
    if stream is None or limit is None:
        return stream
    unlimited = stream.read
    return Stream(stream.head, lambda: islice(unlimited(), limit))


def _open_files(files: list[Path], split: str, head_rows: int) -> Stream:
    stamps = [_stamp(file) for file in files]
    parts = [read_rows(file, head_rows) for file in files]
    digest = hashlib.sha256()
    for file, part in zip(files, parts, strict=True):
        if not len(part.rows):
            raise DataError(f"{file}: the file has no rows")
        digest.update(f"{part.digest}:{file.stat().st_size}\n".encode())
    names = [column_names(part.rows) for part in parts]
    common = shared_columns(names)
    head = Split(
        name=split,
        rows=JoinedRows([part.rows for part in parts], common),
        source=", ".join(map(str, files)),
        fingerprint=f"stream:{digest.hexdigest()}",
        files=tuple((file, len(part.rows)) for file, part in zip(files, parts, strict=True)),
    )
    return Stream(head, partial(_read_files, files, stamps, common))


def _read_files(files: list[Path], stamps: list[Stamp], columns: list[str]) -> Iterator[Located]:
    for file, stamp in zip(files, stamps, strict=True):
        _check_unchanged(file, stamp)
        for number, row in enumerate(_rows_of(file), 1):
            yield Located(str(file), number, {name: row.get(name) for name in columns})
        _check_unchanged(file, stamp)


def _stamp(file: Path) -> Stamp:
    try:
        found = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return found.st_size, found.st_mtime_ns


def _check_unchanged(file: Path, stamp: Stamp) -> None:
    if _stamp(file) != stamp:
        raise DataError(f"{file}: the file has changed since it was first read")


def _rows_of(file: Path) -> Iterator[Row]:
    if file.suffix == ".parquet":
        return parquet_rows(file)
    if file.suffix in (".csv", ".tsv"):
        return delimited_rows(file)
    return (row for _, row in json_rows(file) if row is not None)


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

    def read() -> Iterator[Located]:
        try:
            for number, row in enumerate(splits[found], 1):
                yield Located(source, number, row)
        except Exception as error:
            raise hub_failure(name, error) from error

    return Stream(head, read)
