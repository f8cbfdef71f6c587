"""The generator of WikiSQL-format samples: files, invariants and reproducibility."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lorakit import registry
from lorakit.tasks.wikisql import Database
from lorakit.tasks.wikisql_query import Query

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_wikisql_sample.py"
TASK = registry.tasks()["wikisql"]


def generate(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "wikisql"
    done = generate(out)
    assert done.returncode == 0, done.stderr
    return out


def rows_of(sample: Path, split: str) -> list[dict[str, Any]]:
    return list(TASK.read_file(sample / f"{split}.jsonl"))


def test_files_and_counts(sample: Path) -> None:
    assert sorted(path.name for path in sample.iterdir()) == [
        f"{split}.{kind}" for split in ("dev", "train") for kind in ("db", "jsonl", "tables.jsonl")
    ]
    assert (len(rows_of(sample, "train")), len(rows_of(sample, "dev"))) == (2000, 200)


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert (
            generate(tmp_path / name, "--seed", seed, "--train", "40", "--dev", "8").returncode == 0
        )
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"
    ]
    assert contents[0] == contents[1]
    assert all(contents[0][name] != contents[2][name] for name in contents[0])


@pytest.mark.parametrize("split", ["train", "dev"])
def test_official_invariants(sample: Path, split: str) -> None:
    with closing(Database(sample / f"{split}.db")) as database:
        for row in rows_of(sample, split):
            query = Query.from_json(row["sql"])
            assert database.execute(row["table_id"], query), row
            for column, operator, value in query.conds:
                assert str(value).lower() in row["question"].lower(), row
                assert operator == 0 or row["types"][column] == "real", row


def test_dev_tables_and_headers_are_unseen(sample: Path) -> None:
    train, dev = rows_of(sample, "train"), rows_of(sample, "dev")
    for key in ("table_id", "header"):
        assert not {str(row[key]) for row in train} & {str(row[key]) for row in dev}
    assert not {row["question"] for row in train} & {row["question"] for row in dev}


def test_variety(sample: Path) -> None:
    rows = rows_of(sample, "train")
    assert set(Counter(row["sql"]["agg"] for row in rows)) == set(range(6))
    assert set(Counter(len(row["sql"]["conds"]) for row in rows)) == {1, 2, 3}
    assert set(Counter(cond[1] for row in rows for cond in row["sql"]["conds"])) == {0, 1, 2}
    assert {len(row["header"]) for row in rows} == {3, 4, 5, 6}
    assert len({tuple(row["question"].split()[:3]) for row in rows}) > 60


def test_a_columns_type_fits_its_cells(sample: Path) -> None:
    for line in (sample / "train.tables.jsonl").read_text().splitlines():
        table = json.loads(line)
        assert len(set(table["header"])) == len(table["header"])
        for cells in table["rows"]:
            kinds = ["text" if isinstance(cell, str) else "real" for cell in cells]
            assert kinds == table["types"]


def test_prompts_are_short(sample: Path, smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    examples = [TASK.example(row, TASK.Config()) for row in rows_of(sample, "train")]
    texts = [segment.text for example in examples for segment in example.segments]
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    assert max(lengths[::2]) < 90
    assert max(lengths[1::2]) <= TASK.Config().max_new_tokens // 2


def test_gold_scores_one(sample: Path) -> None:
    config = TASK.Config(path=str(sample))
    split = TASK.load(config, "validation")
    texts = [TASK.example(row, config).segments[1].text for row in split.rows]
    assert TASK.metrics(texts, split, config) == {"lf_accuracy": 1.0, "ex_accuracy": 1.0}


@pytest.mark.parametrize("arguments", [("--train", "0"), ("--dev", "-1"), ("--dev", "many")])
def test_invalid_arguments_write_nothing(tmp_path: Path, arguments: tuple[str, str]) -> None:
    done = generate(tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert generate(tmp_path / "out").returncode == 2
    assert (tmp_path / "out").read_text() == "mine"
