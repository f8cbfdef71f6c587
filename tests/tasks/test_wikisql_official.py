"""``wikisql`` compared with the official evaluator, prediction by prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit import registry
from tests.tasks.wikisql_constructed import TABLES, gold_rows, predictions, write_folder

TASK = registry.tasks()["wikisql"]
GOLDEN = json.loads(Path(__file__).with_name("wikisql_golden.json").read_text(encoding="utf-8"))


def check(file: Path, rows: list[dict[str, Any]], width: dict[str, int], golden: Any) -> None:
    config = TASK.Config(path={"validation": str(file)})
    split = TASK.load(config, "validation")
    lines = predictions(rows, width)
    assert len(lines) == len(golden["lf"]) == len(golden["ex"])
    wrong = []
    for place, (index, line) in enumerate(lines):
        one = replace(split, rows=[split.rows[index]], files=((file, 1),))
        scores = TASK.metrics([line], one, config)
        found = (scores["lf_accuracy"], scores["ex_accuracy"])
        official = (float(golden["lf"][place]), float(golden["ex"][place]))
        if found != official:
            wrong.append((rows[index]["sql"], line, found, official))
    assert not wrong, "\n".join(map(str, [len(wrong), *wrong[:20]]))


def test_constructed_tables(tmp_path: Path) -> None:
    rows = gold_rows()
    folder = write_folder(tmp_path / "wikisql", rows)
    width = {table["id"]: len(table["header"]) for table in TABLES}
    assert len(GOLDEN["constructed"]["lf"]) >= 500
    check(folder / "dev.jsonl", rows, width, GOLDEN["constructed"])


def test_the_official_sample(data_dir: Path) -> None:
    mini = data_dir / "wikisql" / "mini"
    rows, tables = (
        [json.loads(line) for line in (mini / name).read_text(encoding="utf-8").splitlines()]
        for name in ("mini.jsonl", "mini.tables.jsonl")
    )
    width = {table["id"]: len(table["header"]) for table in tables}
    check(mini / "mini.jsonl", rows, width, GOLDEN["mini"])
