"""``task.on_bad_row``: bad rows stop the run, or are skipped, reported and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.rows import NAMED_ROWS
from tests.e2e.previews import command, previewed, recipe_file, texts
from tests.training.runs import adapter_bytes, run_json, write_rows

GOOD = [{"prompt": f"number {n}", "completion": f" {n}"} for n in range(4)]
#: Lines that cannot be parsed, that the task refuses and that leave nothing to train on.
BAD = {
    '{"prompt": "a", "completion": "b': "not JSON: ",
    "3": "not a JSON object",
    '{"prompt": "a", "completion": 3}': "column 'completion' = 3; allowed: text",
    '{"prompt": "a", "completion": ""}': "column 'completion' is empty: nothing to train on",
    '{"prompt": "a"}': "column 'completion' = null; allowed: text",
}


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Relative paths, as in recipes."""


def write_mixed(file: Path) -> None:
    """Write alternating good and bad rows, a good one first."""
    lines = [json.dumps(row) for row in GOOD]
    for index, text in enumerate(BAD):
        lines.insert(2 * index + 1, text)
    file.write_text("".join(f"{line}\n" for line in lines))


def test_bad_rows_end_the_run(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mixed(Path("a.jsonl"))
    for streaming in (False, True):
        code, _, err = command(
            capsys, "train", recipe_file(tiny_llama, "a.jsonl", streaming=streaming)
        )
        assert code == 2
        assert "error: a.jsonl, row 2: not JSON: " in err
        assert not Path("run-recipe.yaml").exists()


@pytest.mark.parametrize("packing", [False, True])
def test_skipped_rows_are_named_and_counted(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], packing: bool
) -> None:
    """The adapter equals that of the good rows alone."""
    write_mixed(Path("a.jsonl"))
    write_rows(Path("good.jsonl"), GOOD)
    keys = {"on_bad_row": "skip", "packing": packing}
    code, _, err = command(capsys, "train", recipe_file(tiny_llama, "a.jsonl", **keys))
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "skipped" in line]
    assert line.startswith("train: 5 of 9 rows skipped (task.on_bad_row: skip): a.jsonl, row 2: ")
    for number, reason in zip((2, 4, 6, 8, 9), BAD.values(), strict=True):
        assert f"a.jsonl, row {number}: {reason}" in line
    data = run_json(Path("run-recipe.yaml"))["data"]["train"]
    assert (data["rows"], data["skipped_rows"]) == (9, 5)
    code, _, err = command(capsys, "train", recipe_file(tiny_llama, "good.jsonl", "b", **keys))
    assert code == 0, err
    assert run_json(Path("run-b"))["data"]["train"]["skipped_rows"] == 0
    assert adapter_bytes(Path("run-recipe.yaml")) == adapter_bytes(Path("run-b"))


def test_preview_skips_them_too(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mixed(Path("a.jsonl"))
    found, err = previewed(capsys, recipe_file(tiny_llama, "a.jsonl", on_bad_row="skip"))
    assert [text.split()[-1] for text in texts(found)] == [
        text.split()[-1] for text in texts(found) if "number" in text
    ]
    assert [row["row"] for row in found["examples"]] == [f"a.jsonl, row {n}" for n in (1, 3, 5, 7)]
    assert found["training_rows"] == 4
    assert "train: 5 of 9 rows skipped (task.on_bad_row: skip): a.jsonl, row 2: " in err


def test_several_files_cells_and_limits(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows keep their numbers, and bad rows count towards a limit."""
    Path("a.csv").write_text("prompt,completion\na, b\nc\nd, e\nf, g, h\n")
    write_rows(Path("b.jsonl"), GOOD)
    path = ["a.csv", "b.jsonl"]
    found, err = previewed(capsys, recipe_file(tiny_llama, path, on_bad_row="skip"))
    assert [row["row"] for row in found["examples"]] == [
        "a.csv, row 1",
        "a.csv, row 3",
        *(f"b.jsonl, row {n}" for n in (1, 2, 3, 4)),
    ]
    assert (
        "train: 2 of 8 rows skipped (task.on_bad_row: skip): a.csv, row 2: 1 cell; the header has "
        "2; a.csv, row 4: 3 cells; the header has 2"
    ) in err
    _, err = previewed(capsys, recipe_file(tiny_llama, path, on_bad_row="skip", limit_train=3))
    assert "train: 1 of 3 rows skipped" in err


@pytest.mark.parametrize("streaming", [False, True])
def test_only_bad_rows(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], streaming: bool
) -> None:
    keys = {"on_bad_row": "skip", "streaming": streaming}
    write_rows(Path("a.jsonl"), [{"prompt": "a", "completion": ""}] * 7)
    code, _, err = command(capsys, "train", recipe_file(tiny_llama, "a.jsonl", **keys))
    assert code == 2
    assert err.splitlines()[-1] == (
        "error: a.jsonl: all 7 rows are bad: task.on_bad_row: skip leaves nothing to train "
        "on; the first is a.jsonl, row 1: column 'completion' is empty: nothing to train on"
    )
    Path("b.jsonl").write_text("{\n{\n")
    code, _, err = command(capsys, "train", recipe_file(tiny_llama, "b.jsonl", **keys))
    assert code == 2
    assert "error: b.jsonl: none of 2 rows can be read; row 1: not JSON: " in err


def test_what_cannot_be_skipped(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a syntax error in an array no row can be recognized; a non-row in a valid array can be
    skipped."""
    text = json.dumps(GOOD)
    Path("a.json").write_text(f"{text[:-1]}, 3]")
    _, err = previewed(capsys, recipe_file(tiny_llama, "a.json", on_bad_row="skip"))
    assert "1 of 5 rows skipped (task.on_bad_row: skip): a.json, row 5: not a JSON object" in err
    Path("a.json").write_text(text.replace("number 2", 'number" 2'))
    code, _, err = command(capsys, "train", recipe_file(tiny_llama, "a.json", on_bad_row="skip"))
    assert code == 2
    assert "error: a.json, row 3: not JSON: " in err
    assert err.endswith("; task.on_bad_row: skip cannot find the start of the next row\n")
    Path("a.csv").write_text('prompt,completion\na, b\n"c"d, e\n')
    code, _, err = command(capsys, "train", recipe_file(tiny_llama, "a.csv", on_bad_row="skip"))
    assert code == 2
    assert "error: a.csv, row 2: " in err
    assert err.endswith("; task.on_bad_row: skip cannot find the start of the next row\n")


def test_rows_that_are_measured_are_never_skipped(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mixed(Path("bad.jsonl"))
    write_rows(Path("good.jsonl"), GOOD)
    Path("predictions.jsonl").write_text('{"prediction": "b"}\n' * 9)
    where = {"train": "good.jsonl", "validation": "bad.jsonl"}
    recipe = recipe_file(tiny_llama, where, on_bad_row="skip", eval_generate="end")
    predictions = ("--predictions", "predictions.jsonl")
    for command_line in (
        ("train", recipe),
        ("eval", recipe, "--base"),
        ("eval", recipe, *predictions),
        ("eval", recipe_file(tiny_llama, "bad.jsonl", "t", on_bad_row="skip"), "--base",
         "--split", "train"),
    ):  # fmt: skip
        code, _, err = command(capsys, *command_line)
        assert code == 2
        assert "error: bad.jsonl, row 2: not JSON: " in err


def test_chats_and_labels(
    tiny_llama: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_rows(
        Path("chats.jsonl"),
        [{"messages": turns}, {"messages": []}, {"messages": turns[:1]}, {"messages": turns}],
    )
    recipe = recipe_file(tiny_llama, "chats.jsonl", name="chat.yaml", on_bad_row="skip")
    settings = ("--set", "task.name=chat", "--set", "task.max_length=200")
    found, err = previewed(capsys, recipe, *settings)
    assert found["training_rows"] == 2
    assert "train: 2 of 4 rows skipped (task.on_bad_row: skip): chats.jsonl, row 2: " in err

    labelled: list[dict[str, Any]] = [{"text": "a", "label": "x"}, {"text": "b", "label": None},
                                      {"text": None, "label": "y"}, {"text": "c", "label": "y"}]  # fmt: skip
    write_rows(Path("labels.jsonl"), labelled)
    recipe = recipe_file(tiny_bert, "labels.jsonl")
    text = json.loads(Path(recipe).read_text())
    text["task"] = {"name": "classification", "path": "labels.jsonl", "on_bad_row": "skip"}
    Path(recipe).write_text(json.dumps(text))
    found, err = previewed(capsys, recipe)
    assert found["label_counts"] == {"x": 1, "y": 1}
    assert "train: 2 of 4 rows skipped (task.on_bad_row: skip): labels.jsonl, row 2: " in err


# Streams


def stream_recipe(model: Path, rows: int, bad: int, **task: Any) -> str:
    lines = [json.dumps({"prompt": f"number {n}", "completion": f" {n}"}) for n in range(rows)]
    for index in range(bad):
        lines.insert(3 + index * 2, list(BAD)[index % len(BAD)])
    Path("s.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return recipe_file(model, "s.jsonl", streaming=True, on_bad_row="skip", **task)


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_skips_each_row_once(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], packing: bool
) -> None:
    """However often the stream restarts."""
    recipe = stream_recipe(tiny_llama, 20, 8, packing=packing)
    settings = ["--set", "train.max_steps=12", "--set", "train.per_device_batch_size=4"]
    code, _, err = command(capsys, "train", recipe, *settings)
    assert code == 0, err
    lines = [line for line in err.splitlines() if "skip" in line]
    named, counted = lines[:-1], lines[-1]
    assert len(named) == NAMED_ROWS
    assert all(
        line.startswith("train: row skipped (task.on_bad_row: skip): s.jsonl, row ")
        for line in named
    )
    assert counted == "train: 8 rows skipped in total (task.on_bad_row: skip)"
    assert run_json(Path("run-recipe.yaml"))["data"]["train"]["skipped_rows"] == 8


def test_a_stream_with_skipped_rows_resumes_where_it_was(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = stream_recipe(tiny_llama, 300, 40)
    settings = ["--set", "train.per_device_batch_size=2", "--set", "train.save_every_steps=55",
                "--set", "train.save_total_limit=9", "--set", "train.max_steps=58"]  # fmt: skip
    code, _, err = command(capsys, "train", recipe, *settings)
    assert code == 0, err
    checkpoint = "run-recipe.yaml/checkpoints/step-55"
    again = [*settings, "--set", "train.output_dir=again", "--resume", checkpoint]
    code, _, err = command(capsys, "train", recipe, *again)
    assert code == 0, err
    assert adapter_bytes(Path("again")) == adapter_bytes(Path("run-recipe.yaml"))
    skipped = [
        run_json(Path(run))["data"]["train"]["skipped_rows"] for run in ("again", "run-recipe.yaml")
    ]
    assert skipped[0] == skipped[1] > 0
