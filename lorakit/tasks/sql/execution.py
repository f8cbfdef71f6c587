"""Execution of WikiSQL queries in SQLite, as the official evaluator does it (lib/dbengine.py).

Its quirks are kept, so that scores compare: text values are lower-cased (the cells were, when the
database was written), a text value against a ``real`` column is turned into a number, and of two
conditions on one column both get the value of the last.
"""

from __future__ import annotations

import re
import sqlite3
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import TracebackType
from typing import Any

from lorakit.tasks.sql.query import AGGREGATIONS, OPERATORS, Query

#: SQLite instructions after which a query is stopped: over a thousand times what a scan of
#: WikiSQL's largest table takes.
MAX_INSTRUCTIONS = 50_000_000
_INSTRUCTIONS_A_CALL = 100_000

_SCHEMA = re.compile(r"\((.+)\)")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")


class Database:
    """A split's tables, opened read-only. Raises sqlite3.Error if the file is no database."""

    def __init__(self, file: Path) -> None:
        self._connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)
        self._types: dict[str, dict[str, str]] = {}
        try:
            self._connection.execute("SELECT name FROM sqlite_master LIMIT 1").fetchall()
        except sqlite3.Error:
            self._connection.close()
            raise

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._connection.close()

    def execute(self, table_id: str, query: Query) -> list[Any]:
        """The result column, in the rows' order. Raises whatever the query makes go wrong."""
        prefixed = table_id.startswith("table")
        table = table_id if prefixed else f"table_{table_id.replace('-', '_')}"
        types = self._column_types(table)
        column = f"col{query.sel}"
        if aggregation := AGGREGATIONS[query.agg]:
            column = f"{aggregation}({column})"
        clauses, values = [], {}
        for index, operator, value in query.conds:
            name = f"col{index}"
            clauses.append(f"{name} {OPERATORS[operator]} :{name}")
            values[name] = bound_value(value, types[name])
        where = f" WHERE {' AND '.join(clauses)}" if clauses else ""
        return self.run_sql(f"SELECT {column} AS result FROM {table}{where}", values)

    def run_sql(self, sql: str, values: dict[str, Any]) -> list[Any]:
        """Return the first column. Raises sqlite3.OperationalError after MAX_INSTRUCTIONS."""
        calls = 0

        def too_long() -> bool:
            nonlocal calls
            calls += 1
            return calls * _INSTRUCTIONS_A_CALL > MAX_INSTRUCTIONS

        self._connection.set_progress_handler(too_long, _INSTRUCTIONS_A_CALL)
        return [row[0] for row in self._connection.execute(sql, values)]

    def _column_types(self, table: str) -> dict[str, str]:
        if table not in self._types:
            found = self._connection.execute(
                "SELECT sql FROM sqlite_master WHERE tbl_name = ?", (table,)
            ).fetchone()
            if found is None:
                raise LookupError(f"no table {table}")
            columns = _SCHEMA.findall(found[0].replace("\n", ""))[0].split(",")
            pairs = [column.split() for column in columns]
            self._types[table] = dict(pairs)
        return self._types[table]


def bound_value(value: Any, kind: str) -> Any:
    """The value as SQLite compares it with a column of type ``kind``.

    Raises whatever a text without a number, or what is neither text nor number, makes go wrong if
    the column is ``real``.
    """
    if isinstance(value, str):
        value = value.lower()
    if kind == "real" and not isinstance(value, (int, float)):
        return _real(value)
    return value


def _real(text: str) -> float:
    # babel's parse_decimal in the English locale, and the evaluator's fallback after it.
    try:
        return float(Decimal(text.replace(",", "")))
    except InvalidOperation:
        return float(_NUMBER.findall(text)[0])
