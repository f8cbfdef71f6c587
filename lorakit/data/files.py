"""Read the rows of a data file without converting text.

Each file is opened here, so a path is never a pattern or a URL, and no cache can be stale. Cells of
csv and tsv files remain text: ``NA``, ``null`` and ``007``. Every row is validated, but none is
kept as an object; large files stay on disk.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.data import json_text
from lorakit.data.compression import (
    COMPRESSED,
    READ_ERRORS,
    as_text,
    decompressed,
    without_compression,
)
from lorakit.data.rows import (
    ByteStore,
    FileStore,
    MemoryBudget,
    Row,
    RowIndex,
    Spool,
    UnreadRow,
    disk_errors,
)
from lorakit.data.tables import TABLE_SUFFIXES, FileRows, read_table, stream_table
from lorakit.errors import DataError, counted

#: Up to this many rows are copied, so that the file they come from can be closed.
_FEW_ROWS = 1000


class UnreadableFile(DataError):
    """A file as a whole, rather than one of its rows, cannot be read or decompressed."""


def read_rows(
    file: Path,
    limit: int | None = None,
    budget: MemoryBudget | None = None,
    skip_bad: bool = False,
) -> FileRows:
    """Read the rows of a file in one of the formats in ``SUFFIXES``.

    With ``limit``, only the first ``limit`` rows are read and validated. Rows are kept in memory if
    ``budget`` allows, otherwise on disk. With ``skip_bad``, each row that cannot be read becomes an
    UnreadRow, provided that the start of the next row can be found.

    Raises DataError, with the row if it is known, if the file's contents do not match its suffix,
    if it is empty, or if it has no readable row.
    """
    check_not_empty(file)
    budget = budget or MemoryBudget()
    if file.suffix in TABLE_SUFFIXES:
        return read_table(file, limit, budget)
    if _format(file) in (".csv", ".tsv"):
        return _read_delimited(file, limit, budget, skip_bad)
    return _read_json(file, limit, budget, skip_bad)


def check_not_empty(file: Path) -> None:
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty")


def stream_rows(file: Path, skip_bad: bool = False) -> Iterator[Row]:
    """Yield the rows one at a time. Raises the same errors as ``read_rows``."""
    if file.suffix in TABLE_SUFFIXES:
        yield from stream_table(file)
    elif _format(file) in (".csv", ".tsv"):
        yield from (row for _, row in _delimited_rows(file, skip_bad))
    else:
        with _open(file) as handle:
            yield from (row for _, row in _json_pieces(file, handle, skip_bad) if row is not None)


def _format(file: Path) -> str:
    return Path(without_compression(file.name)).suffix


# JSON


def _read_json(file: Path, limit: int | None, budget: MemoryBudget, skip_bad: bool) -> FileRows:
    index = RowIndex()
    few = limit is not None and limit <= _FEW_ROWS
    copied = None
    if few or file.suffix in COMPRESSED or budget.fits(file.stat().st_size):
        copied = Spool(budget)
    handle = _open(file)
    store: ByteStore | None = None if copied else FileStore(handle, str(file))
    for piece, row in _json_pieces(file, handle, skip_bad):
        if copied is not None:
            _copy(copied, piece, file)
        if index.add(piece, row) == limit:
            break
    index.check_columns(file)
    if copied is not None:
        handle.close()
        store = copied.finish(str(file))
    assert store is not None, "the rows are either copied or read from the file"
    return FileRows(*index.finish(store))


def _json_pieces(file: Path, handle: BinaryIO, skip_bad: bool) -> Iterator[json_text.Piece]:
    try:
        unpacked = decompressed(file, handle)
        by_line = _format(file) != ".json"
        yield from json_text.pieces(file, unpacked, by_line, skip_bad)
    except READ_ERRORS as error:
        raise UnreadableFile(f"{file}: cannot be read: {error}") from error


def _copy(spool: Spool, data: bytes, file: Path) -> None:
    with disk_errors(f"the rows of {file}"):
        spool.write(data)


# csv and tsv


def _read_delimited(
    file: Path, limit: int | None, budget: MemoryBudget, skip_bad: bool
) -> FileRows:
    index, copied = RowIndex(), Spool(budget)
    for values, row in _delimited_rows(file, skip_bad):
        line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
        _copy(copied, line, file)
        if index.add(line, row) == limit:
            break
    index.check_columns(file)
    return FileRows(*index.finish(copied.finish(str(file))))


def _delimited_rows(file: Path, skip_bad: bool) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the cells of each row, and the row. In tsv files, as in GLUE's, quotes have no special
    meaning."""
    number = 0
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with _open(file) as handle, as_text(file, handle) as lines:
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
                reason = f"{counted(len(values), 'cell')}; the header has {len(header)}"
                if not skip_bad:
                    raise DataError(f"{file}, row {number}: {reason}")
                yield values, UnreadRow(reason)
    except csv.Error as error:
        with json_text.unrecoverable(skip_bad):
            raise DataError(f"{file}, row {number + 1}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8: {error}") from error
    except READ_ERRORS as error:
        raise UnreadableFile(f"{file}: cannot be read: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _checked_header(file: Path, header: list[str]) -> list[str]:
    if not header:
        raise DataError(f"{file}: the first line is empty; it must name the columns")
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{file}: duplicate column {name!r} in the header")
    return header


# Text files


def _open(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
