"""``wikisql``: a question and a table's header -> SQL; logical-form and execution accuracy.

Prompt and completion of a row::

    columns: "Player", "No." real, "Position"
    question: Which player wears number 42?
    SQL: SELECT "Player" FROM t WHERE "No." = 42

``real`` marks the columns of numbers, where the tables file knows the types. The loss is on what
follows ``SQL:``, and on its EOS. Scores: salesforce/WikiSQL, evaluate.py.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.data.examples import Segment, TextExample
from lorakit.data.sources import Split
from lorakit.errors import DataError, shown
from lorakit.recipe.sections import PositiveInt, Text
from lorakit.tasks.base import GenerationSection, Prediction, Row, Task
from lorakit.tasks.sql.execution import Database
from lorakit.tasks.sql.files import database_file, read_rows, tables_file
from lorakit.tasks.sql.query import SPARE_COLUMNS, Query, QueryError, column_names, parse, render


class WikiSqlConfig(GenerationSection):
    """``path`` is required: a directory with ``SPLIT.jsonl`` and ``SPLIT.tables.jsonl`` (either
    may be gzipped), and ``SPLIT.db`` for execution accuracy; or the ``SPLIT.jsonl`` themselves."""

    name: Text = "wikisql"
    max_new_tokens: PositiveInt = 96


class WikiSql(Task):
    names = ("wikisql",)
    summary = "question and table header -> SQL; logical-form and execution accuracy"
    Config = WikiSqlConfig
    kind = "causal"

    def read_file(self, file: Path) -> Sequence[Row]:
        return read_rows(file)

    def load(self, config: Any, split: str) -> Split | None:
        found = super().load(config, split)
        return found and replace(found, fingerprint=_with_tables(found))

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
        return ("\n",)  # a query stands on one line: what follows it is not read

    def main_metric(self, config: Any) -> str:
        return "lf_accuracy"

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """``lf_accuracy`` and, if every file of the split has its database, ``ex_accuracy``.

        A prediction is generated text, ``{"query": {sel, agg, conds}}`` or ``{"error": ...}``.
        Raises DataError for a prediction of another kind or a gold query that cannot execute.
        """
        if len(predictions) != len(split):
            raise DataError(f"{split.source}: {len(predictions)} predictions for {len(split)} rows")
        gold = [Query.from_json(row["sql"]) for row in split.rows]
        read = [
            _read_prediction(prediction, row["header"], number)
            for number, (prediction, row) in enumerate(zip(predictions, split.rows, strict=True), 1)
        ]
        pairs = list(zip(read, gold, strict=True))
        hits = [query is not None and query.matches(wanted) for query, wanted in pairs]
        scores = {"lf_accuracy": sum(hits) / len(hits)}
        files = _files_by_row(split)
        if files and all(database_file(file) for file in set(files)):
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
    """The predicted query; None for one that cannot be read, which counts as wrong."""
    try:
        if isinstance(prediction, str):
            return parse(prediction, header)
        if isinstance(prediction, dict) and prediction.keys() & {"query", "error"}:
            return None if prediction.get("error") else Query.predicted(prediction.get("query"))
    except QueryError:
        return None
    raise DataError(
        f"prediction {number}: {shown(prediction)}; allowed: text, "
        '{"query": {"sel": N, "agg": N, "conds": [...]}} or {"error": TEXT}'
    )


def _files_by_row(split: Split) -> list[Path]:
    files = [file for file, count in split.files for _ in range(count)]
    return files[: len(split)]


def _execution_accuracy(
    pairs: Sequence[tuple[Query | None, Query]], split: Split, files: Sequence[Path]
) -> float:
    hits = 0
    with ExitStack() as stack:
        databases = {file: stack.enter_context(_open(file)) for file in dict.fromkeys(files)}
        for index, (query, wanted) in enumerate(pairs):
            database, table = databases[files[index]], split.rows[index]["table_id"]
            try:
                gold = database.execute(table, wanted)
            except Exception as error:
                raise DataError(
                    f"{split.locate(index)}: the gold query does not execute in "
                    f"{database_file(files[index])}: {error}"
                ) from error
            hits += query is not None and _executes_to(gold, database, table, query)
    return hits / len(pairs)


def _executes_to(gold: list[Any], database: Database, table: str, query: Query) -> bool:
    try:
        return database.execute(table, query) == gold
    except Exception:  # a prediction may go wrong in any way; each is a wrong answer
        return False


def _open(file: Path) -> Database:
    database = database_file(file)
    assert database is not None, "checked by the caller"
    try:
        return Database(database)
    except sqlite3.Error as error:
        raise DataError(f"{database}: cannot be read as an SQLite database: {error}") from error


def _with_tables(split: Split) -> str:
    """The fingerprint of the rows and of the headers that stand in the prompts."""
    digest = hashlib.sha256(split.fingerprint.encode())
    for file, _ in split.files:
        digest.update(tables_file(file).read_bytes())
    return digest.hexdigest()


TASK = WikiSql()
