"""``lorakit validate`` reports the local paths of a recipe that do not exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli.main import run

RECIPE = """\
model:
  name_or_path: {model}
adapter:
  method: lora
task:
  name: {task}
  path: {path}
train:
  output_dir: {output_dir}
"""
GOOD = {"model": "models/tiny", "task": "text", "path": "data.jsonl", "output_dir": "runs/x"}


@pytest.fixture
def files(in_tmp: Path) -> Path:
    (in_tmp / "models" / "tiny").mkdir(parents=True)
    (in_tmp / "models" / "tiny" / "config.json").write_text("{}")
    (in_tmp / "data.jsonl").write_text('{"text": "a"}\n')
    (in_tmp / "folder").mkdir()
    (in_tmp / "folder" / "valid.csv").write_text("text\na\n")
    (in_tmp / "folder" / "notes.txt").write_text("a\n")
    (in_tmp / "empty").mkdir()
    return in_tmp


def problems(capsys: pytest.CaptureFixture[str], **changes: str) -> list[dict[str, Any]]:
    Path("recipe.yaml").write_text(RECIPE.format(**{**GOOD, **changes}))
    code = run(["validate", "recipe.yaml", "--json"])
    (result,) = json.loads(capsys.readouterr().out)
    assert code == (0 if result["valid"] else 2)
    return list(result["problems"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": "some/model"},
        {"model": "gpt2"},
        {"path": "folder"},
        {"path": "[data.jsonl, 'fold*/*.csv']"},
        {"path": "{train: data.jsonl, validation: folder/valid.csv}"},
        {"path": "[{path: data.jsonl, weight: 1}, {path: some/data, split: train, weight: 2}]"},
        {"task": "glue/sst2", "path": "null"},
        {"output_dir": "empty"},
        {"output_dir": "a/b/c"},
    ],
)
def test_what_exists_or_is_on_the_hub_is_valid(
    files: Path, changes: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert problems(capsys, **changes) == []


@pytest.mark.parametrize(
    ("changes", "line", "key", "value", "message"),
    [
        ({"model": "./none"}, 2, "model.name_or_path", "./none", "no such directory"),
        ({"model": "models/tinny"}, 2, "model.name_or_path", "models/tinny", "no such directory"),
        ({"model": "empty"}, 2, "model.name_or_path", "empty", "no config.json in the directory"),
        ({"model": "data.jsonl"}, 2, "model.name_or_path", "data.jsonl", "a file"),
        ({"path": "none.jsonl"}, 7, "task.path", "none.jsonl", "no such file or directory"),
        ({"path": "'n*.csv'"}, 7, "task.path", "n*.csv", "the glob matches no data file"),
        ({"path": "folder/notes.txt"}, 7, "task.path", "folder/notes.txt", "unknown format"),
        ({"path": "empty"}, 7, "task.path", "empty", "no split 'train'; the directory is empty"),
        ({"path": "[data.jsonl, b.csv]"}, 7, "task.path", ["data.jsonl", "b.csv"], "b.csv: no such file or directory"),
        ({"path": "null"}, 7, "task.path", None, "the task has no dataset on the Hub"),
        (
            {"path": "{train: data.jsonl, validation: v.csv}"},
            7, "task.path.validation", "v.csv", "no such file or directory",
        ),
        ({"output_dir": '"a\\nb"'}, 9, "train.output_dir", "a\nb", "contains a control character"),
        ({"output_dir": "data.jsonl"}, 9, "train.output_dir", "data.jsonl", "is a file"),
        ({"output_dir": "data.jsonl/x"}, 9, "train.output_dir", "data.jsonl/x", "Not a directory"),
        ({"output_dir": "x" * 300}, 9, "train.output_dir", "x" * 300, "name too long"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_a_problem(
    files: Path,
    changes: dict[str, str],
    line: int,
    key: str,
    value: object,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (problem,) = problems(capsys, **changes)
    assert (problem["line"], problem["key"], problem["value"]) == (line, key, value)
    assert message in problem["message"]


def test_missing_files_are_reported_with_the_other_problems(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.yaml").write_text(
        RECIPE.format(**{**GOOD, "model": "./none", "path": "none.csv"}) + "  sed: 1\n"
    )
    assert run(["validate", "recipe.yaml", "--set", "adapter.init_from=./no-adapter"]) == 2
    lines = capsys.readouterr().err.splitlines()
    keys = ["model.name_or_path", "task.path", "train.sed", "adapter.init_from"]
    assert [next(key for key in keys if key in line) for line in lines] == keys
    assert all(line.startswith("error: ") for line in lines)
