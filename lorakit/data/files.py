"""A data file -> its rows, without a guess at what its text means.

Each file is opened here: a path is never a pattern or a URL, and no cache can be stale. csv and
tsv cells are text as they stand, so that ``NA``, ``null`` and ``007`` stay what they are. Every row
is checked, and none is held as an object: what is large stays on disk.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorakit.data import json_text, spool
from lorakit.data.parquet import parquet_rows, read_parquet
from lorakit.data.rows import JsonRows, Rows, UnreadRow
from lorakit.data.spool import FileSource, Room, Spool
from lorakit.errors import DataError

#: So many rows are copied sooner than a large file is kept open for them.
_FEW_ROWS = 1000
_LFS_POINTER = b"version https://git-lfs"
#: What reading a file raises, and unpacking it.
_UNREADABLE = (OSError, EOFError, zlib.error)


class UnreadableFile(DataError):
    """A file, rather than one of its rows, cannot be read or unpacked to its end."""


@dataclass(frozen=True)
class FileRows:
    """``digest`` is of what was read."""

    rows: Rows
    digest: str


def read_rows(
    file: Path, limit: int | None = None, room: Room | None = None, skip_bad: bool = False
) -> FileRows:
    """The rows of a file in one of ``SUFFIXES``, or the first ``limit`` of them, of which alone it
    is then known that they are valid; in memory only as far as there is ``room``. With ``skip_bad``
    an UnreadRow stands for a row that cannot be read where the next one can.

    Raises DataError, with the row where that is known, if the file cannot be read as what its name
    says it is, and if it is empty, or has no row that can be read.
    """
    check_not_empty(file)
    room = room or Room()
    if _format(file) == ".parquet":
        return FileRows(*read_parquet(file, limit, room))
    if _format(file) in (".csv", ".tsv"):
        return _read_delimited(file, limit, room, skip_bad)
    return _read_json(file, limit, room, skip_bad)


def check_not_empty(file: Path) -> None:
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty")


def stream_rows(file: Path, skip_bad: bool = False) -> Iterator[Mapping[str, Any]]:
    """The rows one after another, never all at once. Raises DataError as ``read_rows`` does."""
    if _format(file) == ".parquet":
        yield from parquet_rows(file)
    elif _format(file) in (".csv", ".tsv"):
        yield from (row for _, row in _delimited_rows(file, skip_bad))
    else:
        with _opened(file) as handle:
            yield from (r for _, r in _json_pieces(file, handle, skip_bad) if r is not None)


def _format(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix


def _delimited_rows(file: Path, skip_bad: bool) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What a row holds, and the row of text. tsv is read as GLUE writes it: a quote is a character
    like any other."""
    number = 0
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with _opened(file) as handle, _as_text(file, handle) as lines:
            if _format(file) == ".tsv":
                cells = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                cells = csv.reader(lines, strict=True)
            header = _checked_header(file, next(cells, []))
            for values in filter(None, cells):
                number += 1
                if len(values) == len(header):
                    row = dict(zip(header, values, strict=True))
                    yield row, row
                    continue
                reason = f"{len(values)} cells; the header has {len(header)}"
                if not skip_bad:
                    raise DataError(f"{file}, row {number}: {reason}")
                yield values, UnreadRow(reason)
    except csv.Error as error:
        with _end_of_rows(skip_bad):
            raise DataError(f"{file}, row {number + 1}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8: {error}") from error
    except _UNREADABLE as error:
        raise UnreadableFile(f"{file}: cannot be read: {error}") from error
    finally:
        csv.field_size_limit(limit)


class _Index:
    """Rows on their way: where each begins, their names, and the digest of them all."""

    def __init__(self) -> None:
        self.starts = array("q")
        self.names: dict[str, None] = {}
        self._unread: dict[int, str] = {}
        self._end = 0
        self._digest = hashlib.sha256()

    def add(self, line: bytes, row: dict[str, Any] | None) -> int:
        """How many rows there are with this line's."""
        if isinstance(row, UnreadRow):
            self._unread[len(self.starts)] = row.reason
        if row is not None:
            self.starts.append(self._end)
            self.names.update(dict.fromkeys(row))
        self._end += len(line)
        self._digest.update(line)
        return len(self.starts)

    def check(self, file: Path) -> None:
        """Raise DataError if no row has a column."""
        if not self.starts or self.names:
            return
        if self._unread:
            raise DataError(
                f"{file}: none of {len(self.starts):,} rows can be read; row "
                f"{min(self._unread) + 1}: {self._unread[min(self._unread)]}"
            )
        raise DataError(f"{file}: every row is an empty object, {{}}: there are no columns")

    def finished(self, source: spool.Source) -> FileRows:
        self.starts.append(self._end)
        rows = JsonRows(source, self.starts, list(self.names), self._unread)
        return FileRows(rows, self._digest.hexdigest())


def _read_json(file: Path, limit: int | None, room: Room, skip_bad: bool) -> FileRows:
    index = _Index()
    few = limit is not None and limit <= _FEW_ROWS
    kept = None
    if few or file.suffix == ".gz" or room.has(file.stat().st_size):
        kept = Spool(room)
    handle = _opened(file)
    source: spool.Source | None = None if kept else FileSource(handle, str(file))
    for piece, row in _json_pieces(file, handle, skip_bad):
        if kept is not None:
            _keep(kept, piece, file)
        if index.add(piece, row) == limit:
            break
    index.check(file)
    if kept is not None:
        handle.close()
        source = kept.finished(str(file))
    assert source is not None, "one of the two holds the rows"
    return index.finished(source)


def _read_delimited(file: Path, limit: int | None, room: Room, skip_bad: bool) -> FileRows:
    index, kept = _Index(), Spool(room)
    for values, row in _delimited_rows(file, skip_bad):
        line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
        _keep(kept, line, file)
        if index.add(line, row) == limit:
            break
    index.check(file)
    return index.finished(kept.finished(str(file)))


def _keep(kept: Spool, line: bytes, file: Path) -> None:
    with spool.needs_room(f"the rows of {file}"):
        kept.write(line)


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _unpacked(file: Path, handle: BinaryIO) -> BinaryIO:
    """The file's bytes, out of their compression. Raises DataError for what is no UTF-8 text."""
    lines: Any = gzip.GzipFile(fileobj=handle) if file.suffix == ".gz" else handle
    head = lines.read(len(_LFS_POINTER))
    lines.seek(0)
    if head.startswith(_LFS_POINTER):
        raise DataError(f"{file}: a Git LFS pointer, not the data itself; run git lfs pull")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:4]:
        raise DataError(f"{file}: the text is UTF-16 or UTF-32; allowed: UTF-8")
    return cast(BinaryIO, lines)


def _as_text(file: Path, handle: BinaryIO) -> io.TextIOWrapper:
    return io.TextIOWrapper(_unpacked(file, handle), encoding="utf-8-sig", newline="")


def _json_pieces(file: Path, handle: BinaryIO, skip_bad: bool) -> Iterator[json_text.Piece]:
    """The bytes of a JSON file piece by piece, with the rows that they hold. A file's content says
    whether it is an array, and only else its name whether a row has a line of its own."""
    try:
        unpacked = _unpacked(file, handle)
        is_array = json_text.starts_with(unpacked) == "["
        if not is_array and _format(file) != ".json":
            yield from json_text.lines(file, unpacked, skip_bad)
        else:
            read = json_text.array if is_array else json_text.objects
            with _end_of_rows(skip_bad):
                yield from read(file, unpacked, skip_bad)
    except _UNREADABLE as error:
        raise UnreadableFile(f"{file}: cannot be read: {error}") from error


@contextmanager
def _end_of_rows(skip_bad: bool) -> Iterator[None]:
    """For a break behind which the next row cannot be found."""
    try:
        yield
    except DataError as error:
        if not skip_bad:
            raise
        raise DataError(
            f"{error}; task.on_bad_row: skip cannot tell where the next row begins"
        ) from error


def _checked_header(file: Path, header: list[str]) -> list[str]:
    if not header:
        raise DataError(f"{file}: the first line is empty; it must name the columns")
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{file}: the header names the column {name!r} twice")
    return header
