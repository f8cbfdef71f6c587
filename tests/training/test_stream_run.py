"""Runs on a stream of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.errors import DataError, RecipeError, UserError
from lorakit.recipe.sections import Recipe
from lorakit.training.run import dry_run, train
from tests.training.runs import (
    adapter_bytes,
    completion_rows,
    log_lines,
    recipe_for,
    run_json,
    write_rows,
)


def streamed(folder: Path, model: Path, **changes: Any) -> Recipe:
    return recipe_for(
        folder, model,
        **({"task__streaming": True, "task__shuffle_buffer_rows": 10, "train__epochs": None,
            "train__max_steps": 6, "train__save_every_steps": 2} | changes),
    )  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_trains_and_resumes_exactly(
    tiny_llama: Path, tmp_path: Path, packing: bool
) -> None:
    changes = {"task__packing": packing, "train__per_device_batch_size": 2 if packing else 8}
    recipe = streamed(tmp_path, tiny_llama, **changes)
    said: list[str] = []
    train(recipe, say=said.append)
    run = Path(recipe.train.output_dir)
    unit = "bins of 128 tokens" if packing else "rows"
    assert any(
        f"a stream of rows, {2 if packing else 8} {unit} a step: 6 steps;" in s for s in said
    )
    record = run_json(run)
    assert (record["steps"], record["exit_reason"]) == (6, "completed")
    assert record["data"]["train"]["rows"] is record["data"]["train"]["tokens"] is None
    assert record["data"]["validation"]["rows"] == 8
    assert [line["epoch"] for line in log_lines(run)] == [None] * 6
    other = lorakit.load_recipe(run / "recipe.yaml", {"train.output_dir": str(tmp_path / "other")})
    said.clear()
    train(other, resume=str(run / "checkpoints" / "step-4"), say=said.append)
    assert adapter_bytes(Path(other.train.output_dir)) == adapter_bytes(run)
    assert any("read once more" in line for line in said)


def test_every_row_of_a_pass_is_trained_once(tiny_llama: Path, tmp_path: Path) -> None:
    """30 rows in three steps of ten: the trained tokens are those of all rows."""
    changes = {"train__max_steps": 3, "train__per_device_batch_size": 10,
               "train__group_by_length": False}  # fmt: skip
    recipe = streamed(tmp_path / "stream", tiny_llama, **changes)
    train(recipe)
    whole = recipe_for(tmp_path / "whole", tiny_llama, train__epochs=1)
    train(whole)
    found, want = (run_json(Path(r.train.output_dir)) for r in (recipe, whole))
    assert found["trained_tokens"] == want["trained_tokens"]


def test_what_was_cut_is_said_at_the_end(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = streamed(tmp_path, tiny_llama, task__max_length=48)
    said: list[str] = []
    train(recipe, say=said.append)
    (line,) = [line for line in said if line.startswith("train: ")]
    assert "rows cut to 48 tokens" in line


def test_a_bad_row_further_on_fails_with_file_and_row(tiny_llama: Path, tmp_path: Path) -> None:
    rows: list[Any] = completion_rows(1000)
    rows[700] = {"prompt": "red", "completion": 3}
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "validation.jsonl", rows[:8])
    recipe = streamed(tmp_path, tiny_llama, train__max_steps=200, task__shuffle_buffer_rows=300)
    with pytest.raises(DataError, match=r"train\.jsonl, row 701: column 'completion' holds 3"):
        train(recipe)
    assert run_json(Path(recipe.train.output_dir))["exit_reason"] == "failed"


def test_what_a_stream_cannot_do_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.max_steps"):
        streamed(tmp_path, tiny_llama, train__max_steps=None, train__epochs=1)
    recipe = streamed(tmp_path, tiny_llama, task__name="wikisql")
    with pytest.raises(UserError, match=r"task\.streaming = true: wikisql reads files of its own"):
        train(recipe)
    plan = dry_run(streamed(tmp_path, tiny_llama), lambda text: None)
    assert (plan["train_rows"], plan["steps"], plan["steps_per_epoch"]) == (None, 6, None)
