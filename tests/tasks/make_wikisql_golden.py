"""Writes ``wikisql_golden.json``: what WikiSQL's own evaluator says of constructed predictions.

    python -m tests.tasks.make_wikisql_golden CHECKOUT MINI > tests/tasks/wikisql_golden.json

CHECKOUT is one of https://github.com/salesforce/WikiSQL at commit
7857cfd8aefcc9823245c370f9e39ecd55745ea6, whose ``lib`` is run as it stands, with the packages
``records`` and ``babel``; MINI is the directory wikisql/mini of the real data. Of each prediction:
0 or 1, first for the logical form and then for the execution; a prediction on which the evaluator
itself stops is 0.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.tasks.wikisql_constructed import TABLES, gold_rows, predictions, write_folder


def main(checkout: Path, mini: Path) -> None:
    sys.path.insert(0, str(checkout))
    with tempfile.TemporaryDirectory() as folder:
        rows = gold_rows()
        database = write_folder(Path(folder), rows) / "dev.db"
        constructed = _graded(rows, database, {t["id"]: len(t["header"]) for t in TABLES})
    rows = _lines(mini / "mini.jsonl")
    width = {table["id"]: len(table["header"]) for table in _lines(mini / "mini.tables.jsonl")}
    print(json.dumps({"constructed": constructed, "mini": _graded(rows, mini / "mini.db", width)}))


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _graded(rows: list[dict[str, Any]], database: Path, width: dict[str, int]) -> dict[str, str]:
    from lib.dbengine import DBEngine  # type: ignore[import-not-found]
    from lib.query import Query  # type: ignore[import-not-found]

    engine = DBEngine(str(database))
    forms, results = "", ""
    for index, line in predictions(rows, width):
        row = rows[index]
        gold = Query.from_dict(row["sql"])
        wanted = engine.execute_query(row["table_id"], gold, lower=True)
        query, found = None, line.get("error")
        if not found:
            try:
                query = Query.from_dict(line["query"])
                found = engine.execute_query(row["table_id"], query, lower=True)
            except Exception as error:
                found = repr(error)
        try:
            forms += str(int(query == gold))
        except (TypeError, ValueError):
            forms += "0"
        results += str(int(found == wanted))
    return {"lf": forms, "ex": results}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
