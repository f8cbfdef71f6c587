"""A parquet file -> a ``datasets.Dataset``: in memory, or if large in a mapped file."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.data import spool
from lorakit.data.rows import Rows
from lorakit.errors import DataError

_BATCH_ROWS = 1000


def read_parquet(file: Path, limit: int | None, room: spool.Room) -> tuple[Rows, str]:
    """The rows, or the first ``limit``, and a digest of them; in memory if there is ``room``.

    Raises DataError if the file cannot be read, or is too large for the disk of the cache.
    """
    import datasets
    import pyarrow.parquet

    try:
        with file.open("rb") as handle:
            parquet = pyarrow.parquet.ParquetFile(handle)
            batches = _batches(parquet, limit)
            if room.has(size := _bytes(parquet)):
                room.take(size)
                whole = pyarrow.Table.from_batches(batches, parquet.schema_arrow)
                table = datasets.table.InMemoryTable(whole)
            else:
                table = _mapped(batches, parquet.schema_arrow)
        # The fingerprint is given because datasets would hash the whole table for one.
        rows = datasets.Dataset(table, fingerprint=file.name)
        return rows, file_digest(file) if limit is None else _table_digest(table.table)
    except Exception as error:  # Arrow raises what its readers raise
        raise DataError(f"{file}: cannot be read: {_first_line(error)}") from error


def parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows one after another, never all at once. Raises DataError."""
    import pyarrow.parquet

    try:
        with file.open("rb") as handle:
            for batch in pyarrow.parquet.ParquetFile(handle).iter_batches(_BATCH_ROWS):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file}: cannot be read: {_first_line(error)}") from error


def join_tables(parts: Mapping[Path, Any]) -> Rows | None:
    """The rows of the files' tables one after another as one ``datasets.Dataset``, with the columns
    that any of them has; None if types differ in ways that do not show in a row (the width of a
    number, the order of a struct's fields).

    Raises DataError for a column that is of another kind, or has other class names, in two files.
    """
    import datasets
    import pyarrow

    schema = pyarrow.schema([])
    class_names: dict[str, tuple[Path, Any]] = {}
    for file, table in parts.items():
        for column, feature in table.features.items():
            names = getattr(feature, "names", None)
            first, others = class_names.setdefault(column, (file, names))
            if names != others:
                raise DataError(
                    f"task.path: column {column!r} has the class names {others} in {first} and "
                    f"{names} in {file}; allowed: the same in all files"
                )
        try:
            schemas = [schema, table.features.arrow_schema]
            schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
        except pyarrow.ArrowException as error:
            reason = f"{file}: {_first_line(error)}"
            raise DataError(
                f"task.path: a column's type differs between files: {reason}"
            ) from error
    try:
        found: Rows = datasets.concatenate_datasets(list(parts.values()))
    except ValueError:
        return None
    return found


def _batches(parquet: Any, limit: int | None) -> Iterator[Any]:
    left = limit
    for batch in parquet.iter_batches(_BATCH_ROWS):
        yield batch if left is None else batch.slice(0, left)
        if left is not None:
            left -= len(batch)
            if left <= 0:
                return


def _bytes(parquet: Any) -> int:
    """How much the rows are without compression."""
    groups = range(parquet.metadata.num_row_groups)
    return sum(parquet.metadata.row_group(index).total_byte_size for index in groups)


def _mapped(batches: Iterator[Any], schema: Any) -> Any:
    """A table in a mapped Arrow file, which loses its name at once."""
    import datasets
    import pyarrow

    handle, name = tempfile.mkstemp(dir=spool.scratch_dir(), suffix=".arrow")
    try:
        with os.fdopen(handle, "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return datasets.table.MemoryMappedTable.from_file(name)
    finally:
        Path(name).unlink()


def file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class _Digest(io.RawIOBase):
    def __init__(self) -> None:
        self.value = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.value.update(data)
        return len(data)


def _table_digest(table: Any) -> str:
    import pyarrow

    digest = _Digest()
    with pyarrow.ipc.new_stream(pyarrow.PythonFile(digest, "w"), table.schema) as writer:
        writer.write_table(table)
    return digest.value.hexdigest()


def _first_line(error: Exception) -> str:
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
