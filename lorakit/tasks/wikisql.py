"""``wikisql``: write SQL for a question about a table; logical-form and execution accuracy.

A row as text, with the loss on what follows ``SQL:`` and on its EOS::

    columns: "Player", "No." real, "Position"
    question: Which player wears number 42?
    SQL: SELECT "Player" FROM t WHERE "No." = 42

``real`` marks numeric columns, if the tables file has types. Scores are those of
salesforce/WikiSQL, evaluate.py.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sqlite3
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.data.examples import Segment, TextExample
from lorakit.data.sources import Split
from lorakit.errors import BadPrediction, DataError, shown
from lorakit.recipe.sections import PositiveInt, Text
from lorakit.tasks.base import GenerationSection, Prediction, Row, Task, check_count
from lorakit.tasks.wikisql_query import (
    SPARE_COLUMNS,
    Query,
    QueryError,
    column_names,
    parse,
    render,
)

#: SQLite instructions after which a query is stopped: over a thousand times what a scan of
#: WikiSQL's largest table takes.
MAX_INSTRUCTIONS = 50_000_000
_INSTRUCTIONS_PER_CALL = 100_000
_SCHEMA = re.compile(r"\((.+)\)")
_ROW_SUFFIXES = (".jsonl.gz", ".jsonl")


class WikiSqlConfig(GenerationSection):
    """``path`` is required: a directory with ``SPLIT.jsonl`` and ``SPLIT.tables.jsonl`` (either
    may be gzipped), and ``SPLIT.db`` for execution accuracy; or the ``SPLIT.jsonl`` files, with
    the others in the same directory."""

    name: Text = "wikisql"
    max_new_tokens: PositiveInt = 96


class WikiSql(Task):
    names = ("wikisql",)
    summary = "SQL from a question about a table"
    source = "Zhong et al. 2017"
    Config = WikiSqlConfig
    kind = "causal"

    def read_file(self, file: Path) -> Sequence[Row]:
        return read_rows(file)

    def load(self, config: Any, split: str) -> Split | None:
        found = super().load(config, split)
        return found and replace(found, fingerprint=_fingerprint(found))

    def columns(self, config: Any) -> tuple[str, ...]:
        return ("question", "table_id", "header", "types", "sql")

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        return (*self.columns(config), "phase")

    def example(self, row: Row, config: Any) -> TextExample:
        try:
            completion = render(Query.from_json(row["sql"]), row["header"])
        except QueryError as error:
            raise DataError(f"sql: {error}") from error
        return TextExample(
            (Segment(_prompt(row), trained=False), Segment(f" {completion}", trained=True))
        )

    def prompt(self, row: Row, config: Any) -> TextExample:
        return TextExample((Segment(_prompt(row), trained=False),), eos=False)

    def stop_texts(self, config: Any) -> tuple[str, ...]:
        return ("\n",)  # a query is one line; what follows it is ignored

    def main_metric(self, config: Any) -> str:
        return "lf_accuracy"

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """``lf_accuracy`` and, if every file of the split has its database, ``ex_accuracy``.

        A prediction is generated text, ``{"query": {sel, agg, conds}}`` or ``{"error": ...}``.
        Raises DataError for any other prediction and for a gold query that cannot be executed.
        """
        check_count(predictions, split)
        gold = [Query.from_json(row["sql"]) for row in split.rows]
        read = [
            _read_prediction(prediction, row["header"], number)
            for number, (prediction, row) in enumerate(zip(predictions, split.rows, strict=True), 1)
        ]
        pairs = list(zip(read, gold, strict=True))
        hits = [query is not None and query.matches(wanted) for query, wanted in pairs]
        scores = {"lf_accuracy": sum(hits) / len(hits)}
        files = _files_by_row(split)
        if files and all(_database_file(file) for file in set(files)):
            scores["ex_accuracy"] = _execution_accuracy(pairs, split, files)
        return scores


def _prompt(row: Row) -> str:
    names = column_names(row["header"])[:-SPARE_COLUMNS]
    types = row["types"] or [None] * len(names)
    columns = ", ".join(
        '"' + name.replace('"', '""') + ('" real' if kind == "real" else '"')
        for name, kind in zip(names, types, strict=True)
    )
    question = " ".join(row["question"].split())
    return f"columns: {columns}\nquestion: {question}\nSQL:"


def _read_prediction(prediction: Prediction, header: Sequence[str], number: int) -> Query | None:
    """The predicted query; None for an invalid one, which counts as wrong."""
    try:
        if isinstance(prediction, str):
            return parse(prediction, header)
        if isinstance(prediction, dict) and prediction.keys() & {"query", "error"}:
            return None if prediction.get("error") else Query.predicted(prediction.get("query"))
    except QueryError:
        return None
    allowed = 'text, {"query": {"sel": N, "agg": N, "conds": [...]}} or {"error": TEXT}'
    raise BadPrediction(number, shown(prediction), allowed)


def _files_by_row(split: Split) -> list[Path]:
    files = [file for file, count in split.files for _ in range(count)]
    return files[: len(split)]


def _execution_accuracy(
    pairs: Sequence[tuple[Query | None, Query]], split: Split, files: Sequence[Path]
) -> float:
    hits = 0
    with ExitStack() as stack:
        databases = {
            file: stack.enter_context(closing(_open(file))) for file in dict.fromkeys(files)
        }
        for index, (query, wanted) in enumerate(pairs):
            database, table = databases[files[index]], split.rows[index]["table_id"]
            try:
                gold = database.execute(table, wanted)
            except Exception as error:
                raise DataError(
                    f"{split.locate(index)}: the gold query cannot be executed in "
                    f"{_database_file(files[index])}: {error}"
                ) from error
            hits += query is not None and _executes_to(gold, database, table, query)
    return hits / len(pairs)


def _executes_to(gold: list[Any], database: Database, table: str, query: Query) -> bool:
    try:
        return database.execute(table, query) == gold
    except Exception:  # a query that cannot be executed counts as wrong
        return False


def _open(file: Path) -> Database:
    database = _database_file(file)
    assert database is not None, "checked by the caller"
    try:
        return Database(database)
    except sqlite3.Error as error:
        raise DataError(f"{database}: cannot be read as an SQLite database: {error}") from error


class Database:
    """A split's tables, opened read-only. Raises sqlite3.Error if the file is not a database."""

    def __init__(self, file: Path) -> None:
        self._connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)
        self._types: dict[str, dict[str, str]] = {}
        try:
            self._connection.execute("SELECT name FROM sqlite_master LIMIT 1").fetchall()
        except sqlite3.Error:
            self.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def execute(self, table_id: str, query: Query) -> list[Any]:
        """Return the result column, in the order of the rows. Raises any error of the query."""
        prefixed = table_id.startswith("table")
        table = table_id if prefixed else f"table_{table_id.replace('-', '_')}"
        return self.run_sql(*query.statement(table, self._column_types(table)))

    def run_sql(self, sql: str, values: dict[str, Any]) -> list[Any]:
        """The first column of a statement's result. Raises sqlite3.OperationalError if it takes
        more than ``MAX_INSTRUCTIONS``."""
        calls = 0

        def too_long() -> bool:
            nonlocal calls
            calls += 1
            return calls * _INSTRUCTIONS_PER_CALL > MAX_INSTRUCTIONS

        self._connection.set_progress_handler(too_long, _INSTRUCTIONS_PER_CALL)
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


def _fingerprint(split: Split) -> str:
    """Hash the rows, and the tables whose headers are in the prompts."""
    digest = hashlib.sha256(split.fingerprint.encode())
    for file, _ in split.files:
        digest.update(_tables_file(file).read_bytes())
    return digest.hexdigest()


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read rows ``{question, table_id, header, types, sql}``, each with its table's header and
    types (null if the tables file has none) and with any further keys of its line.

    Raises DataError, with file and row, for a missing or unknown table, invalid JSON, and a
    missing or malformed key.
    """
    tables = _read_tables(_tables_file(file))
    rows: list[dict[str, Any]] = []
    try:
        for record in _records(file):
            rows.append(_with_table(record, tables))  # noqa: PERF401 (an error needs the number)
    except QueryError as error:
        raise DataError(f"{file}, row {len(rows) + 1}: {error}") from error
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _tables_file(file: Path) -> Path:
    candidates = [_sibling(file, f".tables{suffix}") for suffix in _ROW_SUFFIXES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = " or ".join(path.name for path in candidates)
    raise DataError(f"{file}: no {names} in the same directory")


def _database_file(file: Path) -> Path | None:
    candidate = _sibling(file, ".db")
    return candidate if candidate.is_file() else None


def _sibling(file: Path, suffix: str) -> Path:
    for row_suffix in _ROW_SUFFIXES:
        if file.name.endswith(row_suffix):
            return file.with_name(file.name.removesuffix(row_suffix) + suffix)
    raise DataError(f"{file}: not in WikiSQL's format; allowed: {' or '.join(_ROW_SUFFIXES)}")


def _read_tables(file: Path) -> dict[str, dict[str, Any]]:
    tables = {}
    for number, table in enumerate(_records(file), 1):
        where = f"{file}, row {number}"
        header, types = table.get("header"), table.get("types")
        if not isinstance(table.get("id"), str):
            raise DataError(f"{where}: id = {shown(table.get('id'))}; allowed: text")
        if not _is_texts(header):
            raise DataError(f"{where}: header = {shown(header)}; allowed: a list of names")
        if types is not None and not (_is_texts(types) and len(types) == len(table["header"])):
            raise DataError(f"{where}: types = {shown(types)}; allowed: one type per column")
        tables[table["id"]] = {"header": header, "types": types}
    return tables


def _with_table(record: dict[str, Any], tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    for key in ("question", "table_id"):
        if not isinstance(record.get(key), str):
            raise QueryError(f"{key} = {shown(record.get(key))}; allowed: text")
    if "sql" not in record:
        raise QueryError("missing key 'sql'")
    table = tables.get(record["table_id"])
    if table is None:
        raise QueryError(f"table_id = {shown(record['table_id'])}: not in the tables file")
    query = Query.from_json(record["sql"])
    read = {
        "question": record["question"],
        "table_id": record["table_id"],
        **table,
        "sql": query.to_json(),
    }
    return {**read, **{key: value for key, value in record.items() if key not in read}}


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file, ignoring blank lines."""
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
        raise DataError(f"{file}, row {number}: invalid JSON: {error}") from error


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


TASK = WikiSql()
