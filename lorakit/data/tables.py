"""Read files of Arrow tables: parquet, and the Arrow files of ``datasets.save_to_disk``."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.rows import MemoryBudget, RowSequence, scratch_dir
from lorakit.errors import DataError

#: The formats that ``read_table`` and ``stream_table`` read.
TABLE_SUFFIXES = (".parquet", ".arrow")
_BATCH_ROWS = 1000
#: The beginning of an Arrow file with random access; ``save_to_disk`` writes streams.
_ARROW_FILE = b"ARROW1"


@dataclass(frozen=True)
class FileRows:
    """The rows of a file; ``digest`` is a hash of what was read."""

    rows: RowSequence
    digest: str


def read_table(file: Path, limit: int | None, budget: MemoryBudget) -> FileRows:
    """Read the rows as a ``datasets.Dataset``, in memory or, if large, in a mapped file.

    Raises DataError if the file is not what its suffix says.
    """
    import datasets
    import pyarrow

    try:
        with _opened(file) as opened:
            batches = _limited(opened.batches, limit)
            if budget.fits(opened.size):
                budget.spend(opened.size)
                whole = pyarrow.Table.from_batches(batches, opened.schema)
                table = datasets.table.InMemoryTable(whole)
            else:
                table = _mapped_table(batches, opened.schema)
        # Without a fingerprint, datasets would hash the whole table to make one.
        rows = datasets.Dataset(table, fingerprint=file.name)
        return FileRows(rows, file_digest(file) if limit is None else _table_digest(table.table))
    except Exception as error:  # Arrow passes on any error of its readers
        raise DataError(f"{file}: cannot be read: {first_line(error)}") from error


def stream_table(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows one at a time. Raises the same errors as ``read_table``."""
    import pyarrow

    try:
        with _opened(file) as opened:
            for batch in opened.batches:
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file}: cannot be read: {first_line(error)}") from error


def file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@dataclass(frozen=True)
class _Opened:
    """An open table: its record batches, of a moderate number of rows, and bytes in memory."""

    schema: Any
    batches: Iterator[Any]
    size: int


@contextmanager
def _opened(file: Path) -> Iterator[_Opened]:
    with file.open("rb") as handle:
        yield _parquet(handle) if file.suffix == ".parquet" else _arrow(handle)


def _parquet(handle: Any) -> _Opened:
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(handle)
    groups = range(parquet.metadata.num_row_groups)
    size = sum(parquet.metadata.row_group(index).total_byte_size for index in groups)
    return _Opened(parquet.schema_arrow, parquet.iter_batches(_BATCH_ROWS), size)


def _arrow(handle: Any) -> _Opened:
    import pyarrow

    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    is_file = handle.read(len(_ARROW_FILE)) == _ARROW_FILE
    handle.seek(0)
    if is_file:
        reader = pyarrow.ipc.open_file(handle)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        return _Opened(reader.schema, batches, size)
    stream = pyarrow.ipc.open_stream(handle)
    return _Opened(stream.schema, iter(stream), size)


def _limited(batches: Iterator[Any], limit: int | None) -> Iterator[Any]:
    left = limit
    for batch in batches:
        yield batch if left is None else batch.slice(0, left)
        if left is not None:
            left -= len(batch)
            if left <= 0:
                return


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
