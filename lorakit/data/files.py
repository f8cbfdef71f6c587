"""A data file -> its rows, without a guess at what its text means.

Each file is opened here: a path is never a pattern or a URL, and no cache can be stale. csv and
tsv cells are text as they stand, so that ``NA``, ``null`` and ``007`` stay what they are. Every row
is checked, and none is held as an object: what is large stays on disk.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import sys
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.data import spool
from lorakit.data.parquet import read_parquet
from lorakit.data.rows import JsonRows, Rows
from lorakit.data.spool import FileSource, Spool
from lorakit.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class FileRows:
    """``digest`` is of what was read."""

    rows: Rows
    digest: str


def read_rows(file: Path, limit: int | None = None) -> FileRows:
    """The rows of a jsonl, jsonl.gz, csv, tsv or parquet file, or the first ``limit`` of them, of
    which alone it is then known that they are valid.

    Raises DataError, with the row where that is known, if the file cannot be read as what its name
    says it is, and if it is empty.
    """
    check_not_empty(file)
    if file.suffix == ".parquet":
        return FileRows(*read_parquet(file, limit))
    if file.suffix in (".csv", ".tsv"):
        return _read_delimited(file, limit)
    return _read_json_lines(file, limit)


def check_not_empty(file: Path) -> None:
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty")


def json_rows(file: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a jsonl or jsonl.gz file, each with the row that it is; None for a blank one.

    Raises DataError, with the row, for what is not UTF-8, not a JSON object, or no text.
    """
    with _open_lines(file) as handle:
        yield from _checked_lines(file, handle)


def delimited_rows(file: Path) -> Iterator[dict[str, str]]:
    """Rows of text. tsv is read as GLUE writes it: a quote is a character like any other."""
    number = 0
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".tsv":
                cells = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                cells = csv.reader(lines, strict=True)
            header = _checked_header(file, next(cells, []))
            for values in filter(None, cells):
                number += 1
                if len(values) != len(header):
                    found = f"{len(values)} cells; the header has {len(header)}"
                    raise DataError(f"{file}, row {number}: {found}")
                yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{file}, row {number + 1}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8: {error}") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    finally:
        csv.field_size_limit(limit)


class _Index:
    """Rows on their way: where each begins, their names, and the digest of them all."""

    def __init__(self) -> None:
        self.starts = array("q")
        self.names: dict[str, None] = {}
        self._end = 0
        self._digest = hashlib.sha256()

    def add(self, line: bytes, row: dict[str, Any] | None) -> int:
        """How many rows there are with this line's."""
        if row is not None:
            self.starts.append(self._end)
            self.names.update(dict.fromkeys(row))
        self._end += len(line)
        self._digest.update(line)
        return len(self.starts)

    def finished(self, source: spool.Source) -> FileRows:
        self.starts.append(self._end)
        rows = JsonRows(source, self.starts, list(self.names))
        return FileRows(rows, self._digest.hexdigest())


def _read_json_lines(file: Path, limit: int | None) -> FileRows:
    index = _Index()
    packed = file.suffix == ".gz"
    kept = Spool() if packed or file.stat().st_size <= spool.IN_MEMORY_BYTES else None
    handle = _opened(file)
    source: spool.Source | None = None if kept else FileSource(handle, str(file))
    lines: Any = gzip.GzipFile(fileobj=handle) if packed else handle
    for line, row in _checked_lines(file, lines):
        if kept is not None:
            _keep(kept, line, file)
        if index.add(line, row) == limit:
            break
    if index.starts and not index.names:
        raise DataError(f"{file}: every row is an empty object, {{}}: there are no columns")
    if kept is not None:
        handle.close()
        source = kept.finished(str(file))
    assert source is not None, "one of the two holds the rows"
    return index.finished(source)


def _read_delimited(file: Path, limit: int | None) -> FileRows:
    index, kept = _Index(), Spool()
    for row in delimited_rows(file):
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        _keep(kept, line, file)
        if index.add(line, row) == limit:
            break
    return index.finished(kept.finished(str(file)))


def _keep(kept: Spool, line: bytes, file: Path) -> None:
    with spool.needs_room(f"the rows of {file}"):
        kept.write(line)


@contextmanager
def _open_lines(file: Path) -> Iterator[Any]:
    with _opened(file) as handle:
        yield gzip.GzipFile(fileobj=handle) if file.suffix == ".gz" else handle


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _checked_lines(file: Path, lines: Any) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    number = 0
    try:
        for line in lines:
            if not line.strip():
                yield line, None
                continue
            number += 1
            yield line, _json_object(f"{file}, row {number}", line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _json_object(where: str, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a JSON object")
    if b"\\ud" in line.lower() and _has_lone_surrogate(value):
        raise DataError(f"{where}: half a surrogate pair, which is no text")
    return value


def _has_lone_surrogate(value: dict[str, Any]) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _checked_header(file: Path, header: list[str]) -> list[str]:
    if not header:
        raise DataError(f"{file}: the first line is empty; it must name the columns")
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{file}: the header names the column {name!r} twice")
    return header
