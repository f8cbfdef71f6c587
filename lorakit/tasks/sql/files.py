"""WikiSQL's files: ``SPLIT.jsonl``, beside it ``SPLIT.tables.jsonl`` and perhaps ``SPLIT.db``."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.errors import DataError
from lorakit.tasks.sql.query import Query, QueryError

_ROW_SUFFIXES = (".jsonl.gz", ".jsonl")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows ``{question, table_id, header, types, sql}``, each with its table's header and types
    (null where the tables file has none) and with what else its line holds.

    Raises DataError, with file and row, for a missing or unknown table, a line that is not JSON,
    and a missing or malformed key.
    """
    tables = _read_tables(tables_file(file))
    rows: list[dict[str, Any]] = []
    try:
        for record in _records(file):
            rows.append(_joined(record, tables))  # noqa: PERF401 (an error needs the number)
    except QueryError as error:
        raise DataError(f"{file}, row {len(rows) + 1}: {error}") from error
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def tables_file(file: Path) -> Path:
    """The tables of a split's file. Raises DataError if there is none."""
    candidates = [_beside(file, f".tables{suffix}") for suffix in _ROW_SUFFIXES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(f"{file}: no {' or '.join(path.name for path in candidates)} beside it")


def database_file(file: Path) -> Path | None:
    """The database of a split's file, if there is one."""
    candidate = _beside(file, ".db")
    return candidate if candidate.is_file() else None


def _beside(file: Path, suffix: str) -> Path:
    for own in _ROW_SUFFIXES:
        if file.name.endswith(own):
            return file.with_name(file.name.removesuffix(own) + suffix)
    raise DataError(f"{file}: WikiSQL's format is {' or '.join(_ROW_SUFFIXES)}")


def _read_tables(file: Path) -> dict[str, dict[str, Any]]:
    tables = {}
    for number, table in enumerate(_records(file), 1):
        header, types = table.get("header"), table.get("types")
        if not isinstance(table.get("id"), str):
            raise DataError(f"{file}, row {number}: id = {table.get('id')!r}: not text")
        if not _is_texts(header):
            raise DataError(f"{file}, row {number}: header = {header!r}: not a list of names")
        if types is not None and not (_is_texts(types) and len(types) == len(table["header"])):
            raise DataError(f"{file}, row {number}: types = {types!r}: not one type a column")
        tables[table["id"]] = {"header": header, "types": types}
    return tables


def _joined(record: dict[str, Any], tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    for key in ("question", "table_id"):
        if not isinstance(record.get(key), str):
            raise QueryError(f"{key} = {record.get(key)!r}: not text")
    if "sql" not in record:
        raise QueryError("no key 'sql'")
    table = tables.get(record["table_id"])
    if table is None:
        raise QueryError(f"table_id = {record['table_id']!r}: no such table in the tables file")
    query = Query.from_json(record["sql"])
    read = {
        "question": record["question"],
        "table_id": record["table_id"],
        **table,
        "sql": query.to_json(),
    }
    return {**read, **{key: value for key, value in record.items() if key not in read}}


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; blank lines are not rows."""
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            for line in lines:
                if not line.strip():
                    continue
                number += 1
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise DataError(f"{file}, row {number}: not a JSON object")
                yield record
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{file}, row {number}: not JSON: {error}") from error


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
