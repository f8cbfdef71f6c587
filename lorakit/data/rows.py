"""Rows of data files, parsed on access rather than kept in memory as objects.

The bytes of a split's rows stay in memory up to a limit, then go to unnamed scratch files in the
cache directory, whose contents can always be recomputed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol, overload

from lorakit.errors import DataError

#: One row of a data file, by column.
Row = Mapping[str, Any]
#: A list, a ``datasets.Dataset``, or one of the classes here.
RowSequence = Sequence[Row]

#: How many bad rows are named; all are counted.
NAMED_ROWS = 5
#: How much of a split's rows is kept in memory; the rest goes to files.
IN_MEMORY_BYTES = 64 << 20
_OTHER_OPEN_FILES = 512
_DECODER = json.JSONDecoder()


# Scratch files


def cache_dir() -> Path:
    """``$LORAKIT_CACHE``, else ``$XDG_CACHE_HOME/lorakit``, else ``~/.cache/lorakit``."""
    if configured := os.environ.get("LORAKIT_CACHE"):
        return Path(configured).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "lorakit"


def scratch_dir() -> Path | None:
    """The cache directory, or None (the system's temporary directory) if it is not writable."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def scratch_file() -> BinaryIO:
    """An unnamed file, which the system deletes when the process ends, even if it is killed."""
    return tempfile.TemporaryFile(dir=scratch_dir())


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn the OSError of a failed write, such as a full disk, into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{what}: cannot write to the disk of {cache_dir()}: {error}; "
            "hint: set LORAKIT_CACHE to another directory"
        ) from error


def allow_open_files(count: int) -> None:
    """Raise the soft limit on open files as far as the system allows, since each file of a split
    that is not kept in memory stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_OPEN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


# Bytes, written once and then read at any offset


class MemoryBudget:
    """The rest of the ``IN_MEMORY_BYTES`` that the files of a split share."""

    def __init__(self) -> None:
        self.left = IN_MEMORY_BYTES

    def fits(self, size: int) -> bool:
        return size <= self.left

    def spend(self, size: int) -> None:
        self.left -= size


class ByteStore(Protocol):
    """Bytes that can be read at any offset, even by several forked processes at once."""

    def read(self, start: int, stop: int) -> bytes: ...


class MemoryStore:
    """Bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, start: int, stop: int) -> bytes:
        return self._data[start:stop]


class FileStore:
    """The bytes of an open file. It is not memory-mapped: the mapping would count as resident
    memory, and truncating the file would crash the process. Raises DataError if the file changes
    after it was opened."""

    def __init__(self, handle: BinaryIO, name: str) -> None:
        self._handle = handle
        self._name = name
        self._opened = self._stamp()

    def read(self, start: int, stop: int) -> bytes:
        data = os.pread(self._handle.fileno(), stop - start, start)
        if self._stamp() != self._opened or len(data) != stop - start:
            raise DataError(f"{self._name}: the file has changed since it was first read")
        return data

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self._handle.fileno())
        return found.st_size, found.st_mtime_ns


class Spool:
    """Collects bytes in memory while ``budget`` allows, then in a scratch file."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._file: BinaryIO = io.BytesIO()
        self._size = 0
        self._budget = budget

    def write(self, data: bytes) -> None:
        """Append. Raises OSError if the disk is full."""
        self._size += len(data)
        if isinstance(self._file, io.BytesIO) and not self._budget.fits(self._size):
            file = scratch_file()
            file.write(self._file.getbuffer())
            self._file = file
        self._file.write(data)

    def finish(self, name: str) -> ByteStore:
        if isinstance(self._file, io.BytesIO):
            self._budget.spend(self._size)
            return MemoryStore(self._file.getvalue())
        self._file.flush()
        return FileStore(self._file, name)


# Rows


class UnreadRow(dict[str, Any]):
    """Represents a row that could not be read; every column is None."""

    def __init__(self, reason: str, columns: Sequence[str] = ()) -> None:
        super().__init__(dict.fromkeys(columns))
        self.reason = reason


class _LazyRows(Sequence[Row]):
    """Rows that are built on access."""

    column_names: list[str]

    def _row(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def _rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        return [self._row(index) for index in range(start, stop)]

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._rows(start, stop)
            return [self._row(i) for i in range(start, stop, step)]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._row(index % len(self))


class JsonRows(_LazyRows):
    """JSON objects, parsed on access; columns of ``column_names`` that an object lacks are None.

    ``starts`` are the offsets at which the objects begin, perhaps after whitespace, followed by
    the end of the text; anything between two objects is ignored. The objects are known to be valid
    except those in ``unread``, which maps an index to the reason.
    """

    def __init__(
        self,
        store: ByteStore,
        starts: array[int],
        column_names: list[str],
        unread: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._store = store
        self._starts = starts
        self._unread = unread
        self.column_names = column_names

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _row(self, index: int) -> dict[str, Any]:
        if index in self._unread:
            return UnreadRow(self._unread[index], self.column_names)
        data = self._store.read(self._starts[index], self._starts[index + 1])
        row, _ = _DECODER.raw_decode(data.decode("utf-8-sig").lstrip(" \t\r\n"))
        return {name: row.get(name) for name in self.column_names}


class RowIndex:
    """Builds ``JsonRows``: collects the offset of each row, the column names and a digest."""

    def __init__(self) -> None:
        self.starts = array("q")
        self.names: dict[str, None] = {}
        self._unread: dict[int, str] = {}
        self._end = 0
        self._digest = hashlib.sha256()

    def add(self, data: bytes, row: dict[str, Any] | None) -> int:
        """Add the next bytes, which begin with ``row``, and return the number of rows."""
        if isinstance(row, UnreadRow):
            self._unread[len(self.starts)] = row.reason
        if row is not None:
            self.starts.append(self._end)
            self.names.update(dict.fromkeys(row))
        self._end += len(data)
        self._digest.update(data)
        return len(self.starts)

    def check_columns(self, file: Path) -> None:
        """Raise DataError if there are rows and none has a column."""
        if not self.starts or self.names:
            return
        if self._unread:
            first = min(self._unread)
            raise DataError(
                f"{file}: none of {len(self.starts):,} rows can be read; "
                f"row {first + 1}: {self._unread[first]}"
            )
        raise DataError(f"{file}: every row is an empty object, {{}}: there are no columns")

    def finish(self, store: ByteStore) -> tuple[JsonRows, str]:
        """Return the rows, whose bytes are in ``store``, and the digest."""
        self.starts.append(self._end)
        rows = JsonRows(store, self.starts, list(self.names), self._unread)
        return rows, self._digest.hexdigest()


class JoinedRows(_LazyRows):
    """The rows of several files, concatenated; columns of ``column_names`` that a row lacks are
    None."""

    def __init__(self, parts: Sequence[RowSequence], column_names: list[str]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))
        self.column_names = column_names

    def __len__(self) -> int:
        return self._ends[-1]

    def _row(self, index: int) -> dict[str, Any]:
        number = bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        return self._filled(self._parts[number][index - start])

    def _rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for part, end in zip(self._parts, self._ends, strict=True):
            first = end - len(part)
            begin, until = max(start - first, 0), min(stop - first, len(part))
            if begin < until:
                found += map(self._filled, row_range(part, begin, until))
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for part in self._parts:
            yield from map(self._filled, part)

    def _filled(self, row: Row) -> dict[str, Any]:
        if isinstance(row, UnreadRow):
            return UnreadRow(row.reason, self.column_names)
        return {name: row.get(name) for name in self.column_names}


class SelectedRows(_LazyRows):
    """The rows of ``rows`` at ``indices``."""

    def __init__(self, rows: RowSequence, indices: Sequence[int]) -> None:
        self._all, self._indices = rows, array("q", indices)
        self.column_names = column_names(rows)

    def __len__(self) -> int:
        return len(self._indices)

    def _row(self, index: int) -> dict[str, Any]:
        row: Any = self._all[self._indices[index]]
        return row if isinstance(row, dict) else dict(row)


def column_names(rows: RowSequence) -> list[str]:
    """The names that occur in any row, in order of first occurrence."""
    names = getattr(rows, "column_names", None)
    return list(names if names is not None else dict.fromkeys(key for row in rows for key in row))


def row_range(rows: RowSequence, start: int, stop: int) -> RowSequence:
    """``rows[start:stop]`` as a sequence of rows. A ``Dataset``, which is slow row by row, is read
    in one call."""
    if not hasattr(rows, "features"):
        return rows[start:stop]
    columns: Any = rows[start:stop]
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
