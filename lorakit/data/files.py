"""Read the rows of a data file without converting text.

Each file is opened here, so a path is never a pattern or a URL, and no cache can be stale. Cells of
csv and tsv files remain text: ``NA``, ``null`` and ``007``. Every row is validated, but none is
kept as an object; large files stay on disk.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorakit.data import json_text
from lorakit.data.rows import (
    ByteStore,
    FileStore,
    MemoryBudget,
    Row,
    RowIndex,
    RowSequence,
    Spool,
    UnreadRow,
    disk_errors,
    scratch_dir,
)
from lorakit.errors import DataError

#: Up to this many rows are copied, so that the file they come from can be closed.
_FEW_ROWS = 1000
_BATCH_ROWS = 1000
_LFS_POINTER = b"version https://git-lfs"
#: Raised by reading and decompressing a file.
_READ_ERRORS = (OSError, EOFError, zlib.error)


class UnreadableFile(DataError):
    """A file as a whole, rather than one of its rows, cannot be read or decompressed."""


@dataclass(frozen=True)
class FileRows:
    """The rows of a file; ``digest`` is a hash of what was read."""

    rows: RowSequence
    digest: str


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
    if _format(file) == ".parquet":
        return _read_parquet(file, limit, budget)
    if _format(file) in (".csv", ".tsv"):
        return _read_delimited(file, limit, budget, skip_bad)
    return _read_json(file, limit, budget, skip_bad)


def check_not_empty(file: Path) -> None:
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty")


def stream_rows(file: Path, skip_bad: bool = False) -> Iterator[Row]:
    """Yield the rows one at a time. Raises the same errors as ``read_rows``."""
    if _format(file) == ".parquet":
        yield from _stream_parquet(file)
    elif _format(file) in (".csv", ".tsv"):
        yield from (row for _, row in _delimited_rows(file, skip_bad))
    else:
        with _open(file) as handle:
            yield from (row for _, row in _json_pieces(file, handle, skip_bad) if row is not None)


def file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _format(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix


# JSON


def _read_json(file: Path, limit: int | None, budget: MemoryBudget, skip_bad: bool) -> FileRows:
    index = RowIndex()
    few = limit is not None and limit <= _FEW_ROWS
    copied = None
    if few or file.suffix == ".gz" or budget.fits(file.stat().st_size):
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
        unpacked = _decompressed(file, handle)
        by_line = _format(file) != ".json"
        yield from json_text.pieces(file, unpacked, by_line, skip_bad)
    except _READ_ERRORS as error:
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
        with _open(file) as handle, _as_text(file, handle) as lines:
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
        with json_text.unrecoverable(skip_bad):
            raise DataError(f"{file}, row {number + 1}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8: {error}") from error
    except _READ_ERRORS as error:
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


def _decompressed(file: Path, handle: BinaryIO) -> BinaryIO:
    """Decompress the file if it is gzipped. Raises DataError for a Git LFS pointer, UTF-16 and
    UTF-32."""
    lines: Any = gzip.GzipFile(fileobj=handle) if file.suffix == ".gz" else handle
    head = lines.read(len(_LFS_POINTER))
    lines.seek(0)
    if head.startswith(_LFS_POINTER):
        raise DataError(f"{file}: a Git LFS pointer, not the data itself; hint: run git lfs pull")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:4]:
        raise DataError(f"{file}: the text is UTF-16 or UTF-32; allowed: UTF-8")
    return cast(BinaryIO, lines)


def _as_text(file: Path, handle: BinaryIO) -> io.TextIOWrapper:
    return io.TextIOWrapper(_decompressed(file, handle), encoding="utf-8-sig", newline="")


# parquet


def _read_parquet(file: Path, limit: int | None, budget: MemoryBudget) -> FileRows:
    """Read the rows as a ``datasets.Dataset``, in memory or, if large, in a mapped file."""
    import datasets
    import pyarrow.parquet

    try:
        with file.open("rb") as handle:
            parquet = pyarrow.parquet.ParquetFile(handle)
            batches = _parquet_batches(parquet, limit)
            if budget.fits(size := _uncompressed_size(parquet)):
                budget.spend(size)
                whole = pyarrow.Table.from_batches(batches, parquet.schema_arrow)
                table = datasets.table.InMemoryTable(whole)
            else:
                table = _mapped_table(batches, parquet.schema_arrow)
        # Without a fingerprint, datasets would hash the whole table to make one.
        rows = datasets.Dataset(table, fingerprint=file.name)
        return FileRows(rows, file_digest(file) if limit is None else _table_digest(table.table))
    except Exception as error:  # Arrow passes on any error of its readers
        raise DataError(f"{file}: cannot be read: {first_line(error)}") from error


def _stream_parquet(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        with file.open("rb") as handle:
            for batch in pyarrow.parquet.ParquetFile(handle).iter_batches(_BATCH_ROWS):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file}: cannot be read: {first_line(error)}") from error


def _parquet_batches(parquet: Any, limit: int | None) -> Iterator[Any]:
    left = limit
    for batch in parquet.iter_batches(_BATCH_ROWS):
        yield batch if left is None else batch.slice(0, left)
        if left is not None:
            left -= len(batch)
            if left <= 0:
                return


def _uncompressed_size(parquet: Any) -> int:
    groups = range(parquet.metadata.num_row_groups)
    return sum(parquet.metadata.row_group(index).total_byte_size for index in groups)


def _mapped_table(batches: Iterator[Any], schema: Any) -> Any:
    """Write a table to an Arrow file and map it; the file is unlinked immediately."""
    import datasets
    import pyarrow

    handle, name = tempfile.mkstemp(dir=scratch_dir(), suffix=".arrow")
    try:
        with os.fdopen(handle, "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return datasets.table.MemoryMappedTable.from_file(name)
    finally:
        Path(name).unlink()


class _HashingFile(io.RawIOBase):
    """A file that hashes what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)


def _table_digest(table: Any) -> str:
    import pyarrow

    file = _HashingFile()
    with pyarrow.ipc.new_stream(pyarrow.PythonFile(file, "w"), table.schema) as writer:
        writer.write_table(table)
    return file.digest.hexdigest()


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
