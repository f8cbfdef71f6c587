"""Data files on the command line: arrays, shards, globs, columns missing from some files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.previews import command, previewed, recipe_file, texts
from tests.training.runs import adapter_bytes, run_json, tree, write_rows

COLOURS = [
    {"instruction": "Name a colour", "output": "blue"},
    {"instruction": "Name a fruit", "output": "fig"},
]
GREETING = {"instruction": "Translate to French", "input": "good morning", "output": "bonjour"}


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Relative paths, as in recipes."""


# Columns that not every file has


@pytest.mark.parametrize("task", ["completion", "chat", "auto"])
def test_a_column_of_one_file_is_kept(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    write_rows(Path("a.jsonl"), [GREETING])
    write_rows(Path("b.jsonl"), COLOURS)
    for path in (["a.jsonl", "b.jsonl"], ["b.jsonl", "a.jsonl"]):
        keys = {} if task == "completion" else {"name": task}
        found, err = previewed(capsys, recipe_file(tiny_llama, path, **keys, max_length=600))
        with_input = [text for text in texts(found) if "good morning" in text]
        assert len(with_input) == 1
        assert "bonjour" in with_input[0]
        assert len(found["examples"]) == 3
        assert "columns missing from some files, empty in their rows: 'input' (b.jsonl)" in err
        assert all("None" not in text for text in texts(found))


def test_a_column_that_begins_late_in_a_stream_is_read(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows before the column appears have it empty; it is not ignored."""
    rows: list[dict[str, Any]] = [
        {"instruction": f"Name number {n}", "output": str(n)} for n in range(210)
    ]
    late = [{**row, "input": f"digits {row['output']}"} for row in rows[205:]]
    data = {
        "late": [*rows[:205], *late],
        "blank": [*({**row, "input": ""} for row in rows[:205]), *late],
        "without": rows,
    }
    trained = {}
    for name, content in data.items():
        write_rows(Path(f"{name}.jsonl"), content)
        recipe = recipe_file(tiny_llama, f"{name}.jsonl", f"{name}.yaml", streaming=True)
        settings = ["train.per_device_batch_size=6", "train.max_steps=36", "train.warmup_ratio=0"]
        code, _, err = command(capsys, "train", recipe, *(f"--set={s}" for s in settings))
        assert code == 0, err
        trained[name] = adapter_bytes(Path(f"run-{name}.yaml"))
    assert trained["late"] == trained["blank"] != trained["without"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("task", ["auto", "prompt_completion"])
def test_a_required_column_that_one_file_lacks(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], streaming: bool, task: str
) -> None:
    write_rows(Path("a.jsonl"), [{"prompt": "a", "completion": "b"}] * 2)
    write_rows(Path("b.jsonl"), [{"prompt": "a", "answer": "b"}])
    recipe = recipe_file(tiny_llama, ["a.jsonl", "b.jsonl"], format=task, streaming=streaming)
    code, _, err = command(capsys, "train", recipe)
    assert code == 2
    key = "" if task == "auto" else 'recipe.yaml, line 1: task.format = "prompt_completion": '
    expected = "b.jsonl, row 1: no column 'completion'; the columns are 'prompt', 'answer'"
    assert err.splitlines()[-1] == f"error: {key}{expected}"
    recipe = recipe_file(tiny_llama, "a.jsonl", prompt_column="question", streaming=streaming)
    code, _, err = command(capsys, "train", recipe)
    assert code == 2
    assert (
        "task.prompt_column = \"question\": a.jsonl: no column 'question'; the columns are 'prompt', "
        "'completion'"
    ) in err


# Files of all forms


FORMS: dict[str, tuple[dict[str, list[dict[str, str]]], Any]] = {
    "array": ({"train.json": COLOURS}, "train.json"),
    "directory": ({"d/train.json": COLOURS}, "d"),
    "shards": (
        {f"d/train-0000{n}-of-00002.jsonl": COLOURS[n : n + 1] for n in (0, 1)}, "d",
    ),
    "glob": ({f"d/x-{n}.json": COLOURS[n : n + 1] for n in (0, 1)}, "d/x-*.json"),
    "mixture": (
        {"a.jsonl": COLOURS[:1], "d/train.jsonl": COLOURS[1:]},
        [{"path": "a.jsonl", "weight": 1}, {"path": "d", "weight": 1}],
    ),
    "several": (
        {"a.jsonl": COLOURS[:1], "b.json": COLOURS[1:], "v.jsonl": COLOURS},
        {"train": ["a.jsonl", "b.json"], "validation": "v.jsonl"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_command_reads_every_form(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    files, path = FORMS[form]
    for name, rows in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        if name.endswith(".json"):
            Path(name).write_text(json.dumps(rows, indent=2))
        else:
            write_rows(Path(name), rows)
    recipe = recipe_file(tiny_llama, path)
    assert command(capsys, "validate", recipe)[0] == 0
    found, _ = previewed(capsys, recipe)
    assert ["blue" in text for text in texts(found)] == [True, False]
    code, out, err = command(capsys, "eval", recipe, "--base", "--split", "train", "--json")
    assert code == 0, err
    assert json.loads(out)["examples"] == 2
    fingerprints = set()
    code, _, err = command(capsys, "train", recipe)
    assert code == 0, err
    again = ["--output-dir", "again"]
    assert command(capsys, "train", "run-recipe.yaml/recipe.yaml", *again)[0] == 0
    for folder in (Path("run-recipe.yaml"), Path("again")):
        assert run_json(folder)["data"]["train"]["rows"] == 2
        fingerprints.add(run_json(folder)["data"]["train"]["fingerprint"])
    assert len(fingerprints) == 1
    assert adapter_bytes(Path("run-recipe.yaml")) == adapter_bytes(Path("again"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "d",
            "task.path = \"d\": no split 'train'; the directory contains a.jsonl, x-0-of-2.jsonl; hint: name",
        ),
        ("d/y-*.jsonl", 'task.path = "d/y-*.jsonl": the glob matches no data file'),
        ("d/x-*.jsonl", 'task.path = "d/x-*.jsonl": missing shard: d/x-1-of-2.jsonl'),
        (
            ["d/a.jsonl", "d/a.jsonl"],
            'task.path = ["d/a.jsonl", "d/a.jsonl"]: duplicate file d/a.jsonl',
        ),
        ({"validation": "d/a.jsonl"}, "}: no split 'train'; allowed: validation"),
        (
            {"train": "d"},
            'task.path = {"train": "d"}: d: no split \'train\'; the directory contains a.jsonl',
        ),
        (
            [{"path": "d/a.jsonl", "weight": 1}, {"path": "d/b.jsonl", "weight": 2}],
            '"weight": 2.0}]: d/b.jsonl: no such file or directory',
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_refused(
    tiny_llama: Path,
    capsys: pytest.CaptureFixture[str],
    path: Any,
    expected: str,
    streaming: bool,
) -> None:
    for name in ("a", "x-0-of-2"):
        write_rows(Path(f"d/{name}.jsonl"), COLOURS)
    recipe = recipe_file(tiny_llama, path, streaming=streaming)
    before = tree(Path())
    for arguments in (["train", recipe], ["preview", recipe]):
        code, _, err = command(capsys, *arguments)
        assert code == 2
        assert expected in err
        assert "Traceback" not in err
    assert tree(Path()) == before


def test_an_output_is_no_shard(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("d/validation-0.jsonl"), COLOURS)
    write_rows(Path("e/x.jsonl"), COLOURS)
    for path in ("d", {"validation": ["d/*.jsonl"]}, {"dev": "d/validation-0.jsonl"}):
        recipe = recipe_file(tiny_llama, path)
        arguments = ("eval", recipe, "--base", "--output", "d/validation-0.jsonl")
        code, _, err = command(capsys, *arguments)
        assert code == 2
        assert "--output d/validation-0.jsonl: is a data file of the task" in err


# Columns in a template


TEMPLATE = {"template": "{q} {ctx}", "completion_template": " {a}"}


def test_a_column_of_a_template_that_rows_lack(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the column is null, appears late or is in another file."""
    with_it, null = {"q": "one", "ctx": "here", "a": "x"}, {"q": "two", "ctx": None, "a": "y"}
    without = {"q": "three", "a": "z"}
    layouts = {
        "a.jsonl": {"a.jsonl": [without, null, with_it]},
        ("b.jsonl", "c.jsonl"): {"b.jsonl": [without, null], "c.jsonl": [with_it]},
    }
    for path, files in layouts.items():
        for name, rows in files.items():
            write_rows(Path(name), rows)
        where = path if isinstance(path, str) else list(path)
        recipe = recipe_file(tiny_llama, where, **TEMPLATE)
        found, err = previewed(capsys, recipe)
        assert [text.partition(" ")[0] for text in texts(found)] == ["three", "two", "one"]
        assert "train: 2 of 3 rows have no 'ctx', which is empty in the template" in err
        recipe = recipe_file(tiny_llama, where, **TEMPLATE, streaming=True)
        code, _, err = command(capsys, "train", recipe, "--set", f"train.output_dir=s-{len(path)}")
        assert code == 0, err
        assert "train: 2 of 3 rows have no 'ctx', which is empty in the template" in err


def test_a_column_of_a_template_that_a_stream_begins_or_ends_without(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"q": f"q{n}", "ctx": "here", "a": "x"} for n in range(200)]
    later = [{"q": f"q{n}", "a": "x"} for n in range(8)]
    write_rows(Path("ends.jsonl"), rows + later)
    write_rows(Path("begins.jsonl"), later * 25 + rows)
    keys = {**TEMPLATE, "streaming": True, "shuffle_buffer_rows": 1}
    recipe = recipe_file(tiny_llama, "ends.jsonl", **keys)
    code, _, err = command(capsys, "train", recipe, "--set", "train.per_device_batch_size=5")
    assert code == 0, err
    assert err.count("train: further rows have no 'ctx', which is empty in the template") == 1
    recipe = recipe_file(tiny_llama, "begins.jsonl", "b.yaml", **keys)
    code, _, err = command(capsys, "train", recipe)
    assert code == 2
    assert (": begins.jsonl, the first 200 rows: no column 'ctx'; the columns are 'q', 'a'") in err


def test_an_empty_text_of_a_template(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"q": "one", "ctx": "here", "a": "x"}, {"a": "y"}]
    write_rows(Path("a.jsonl"), rows)
    code, _, err = command(capsys, "preview", recipe_file(tiny_llama, "a.jsonl", **TEMPLATE))
    assert code == 2
    assert "error: a.jsonl, row 2: the text of task.template is empty" in err
    write_rows(Path("a.jsonl"), [rows[0], {"q": "two"}])
    code, _, err = command(capsys, "preview", recipe_file(tiny_llama, "a.jsonl", **TEMPLATE))
    assert code == 2
    assert "error: a.jsonl, row 2: the text of task.completion_template is empty" in err


def test_a_missing_text_of_a_pair(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "a", "pair": "b", "label": "x"}, {"text": "c", "label": "y"}]
    write_rows(Path("a.jsonl"), rows)
    recipe = recipe_file(tiny_bert, "a.jsonl")
    values = json.loads(Path(recipe).read_text())
    values["task"] = {"name": "classification", "path": "a.jsonl", "text_pair_column": "pair"}
    Path(recipe).write_text(json.dumps(values))
    code, _, err = command(capsys, "train", recipe)
    assert code == 2
    assert "error: a.jsonl, row 2: column 'pair' = null; allowed: text" in err


# A bad row


def test_one_bad_row(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": ""}]
    write_rows(Path("a.jsonl"), rows)
    for streaming in (False, True):
        recipe = recipe_file(tiny_llama, "a.jsonl", streaming=streaming)
        code, _, err = command(capsys, "train", recipe)
        assert code == 2
        assert "error: a.jsonl, row 2: column 'completion' is empty: nothing to train on" in err
        assert not Path("run-recipe.yaml").exists()


def test_a_bad_row_in_a_stream(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"number {n}", "completion": f" {n}"} for n in range(300)]
    rows[260]["completion"] = ""
    Path("a.json").write_text(json.dumps(rows))
    recipe = recipe_file(tiny_llama, "a.json", streaming=True, shuffle_buffer_rows=1)
    settings = ["--set", "train.max_steps=70", "--set", "train.per_device_batch_size=4"]
    code, _, err = command(capsys, "train", recipe, *settings)
    assert code == 2
    assert err.splitlines()[-1] == (
        "error: a.json, row 261: column 'completion' is empty: nothing to train on; stopped at "
        "step 50 of 70; saved run-recipe.yaml/checkpoints/step-50; correct or remove the row, then "
        "resume with --resume auto"
    )
    rows[260]["completion"] = " mended"
    Path("a.json").write_text(json.dumps(rows, indent=1))
    code, _, err = command(capsys, "train", recipe, *settings, "--resume", "auto")
    assert code == 0, err
    assert "resumed from run-recipe.yaml/checkpoints/step-50" in err
    assert run_json(Path("run-recipe.yaml"))["exit_reason"] == "completed"
