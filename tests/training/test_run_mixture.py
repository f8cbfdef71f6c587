"""Runs on a mixture of sources with weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.errors import UserError
from lorakit.recipe.sections import Recipe
from lorakit.training.run import dry_run, train
from tests.training.runs import adapter_bytes, learning, recipe_for, run_json, write_rows

#: By source: the rows, the rows that an epoch draws with weights 1, 2 and 5, and the trained tokens
#: of each row. Their sum over an epoch tells how many rows of each source it has.
ROWS = {"a": 40, "b": 20, "c": 30}
DRAWN = {"a": 6, "b": 12, "c": 30}
TOKENS = {"a": 2, "b": 8, "c": 58}
BATCHED: dict[str, dict[str, Any]] = {
    "rows": {},
    "packed": {"task__packing": True, "train__per_device_batch_size": 3},
    "token budget": {"train__max_tokens_per_batch": 256, "train__per_device_batch_size": None},
    "accumulated": {"train__gradient_accumulation_steps": 2, "train__per_device_batch_size": 4},
}


def mixture(folder: Path, model: Path, **changes: Any) -> Recipe:
    path = []
    for (name, count), weight in zip(ROWS.items(), (1, 2, 5), strict=True):
        text = "x" * (TOKENS[name] - 1)
        rows = [{"prompt": f"{number:02}:", "completion": text} for number in range(count)]
        write_rows(folder / f"{name}.jsonl", rows)
        path.append({"path": str(folder / f"{name}.jsonl"), "weight": weight})
    return recipe_for(folder, model, **{"task__path": path, "train__save_every_steps": 2} | changes)


def resumed(recipe: Recipe, step: int, **overrides: Any) -> Path:
    """Resume from a checkpoint in another directory."""
    run = Path(recipe.train.output_dir)
    other = run.with_name(f"from-{step}")
    changes = {"train.output_dir": str(other), **overrides}
    again = lorakit.load_recipe(run / "recipe.yaml", changes)
    train(again, resume=str(run / "checkpoints" / f"step-{step}"))
    return other


@pytest.mark.parametrize("batched", BATCHED)
def test_shares_of_an_epoch_and_exact_resume_in_it(
    tiny_llama: Path, tmp_path: Path, batched: str
) -> None:
    recipe = mixture(
        tmp_path, tiny_llama, train__epochs=2, train__save_total_limit=None, **BATCHED[batched]
    )
    said: list[str] = []
    train(recipe, say=said.append)
    run = Path(recipe.train.output_dir)
    record = run_json(run)
    assert record["trained_tokens"] == 2 * sum(DRAWN[name] * TOKENS[name] for name in ROWS)
    assert [source["rows_per_epoch"] for source in record["data"]["train"]["sources"]] == [
        6,
        12,
        30,
    ]
    assert any("an epoch draws 48 rows by weight: 6 of 40 from " in line for line in said)
    assert any(line.startswith("48 rows") and ", by weight: " in line for line in said)
    steps_per_epoch = record["steps"] // 2
    middle = steps_per_epoch + steps_per_epoch // 2 // 2 * 2
    middle += middle % 2
    assert steps_per_epoch < middle < record["steps"]
    for step in (2, middle):
        other = resumed(recipe, step)
        assert adapter_bytes(other) == adapter_bytes(run)
        assert learning(other)[-1] == learning(run)[-1]


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_has_the_shares_and_resumes_exactly(
    tiny_llama: Path, tmp_path: Path, packing: bool
) -> None:
    """The three windows of 50 steps and 16 rows each contain every source several times."""
    changes = {"task__streaming": True, "task__shuffle_buffer_rows": 20, "train__epochs": None,
               "train__max_steps": 60, "train__save_every_steps": 55, "task__packing": packing,
               "train__log_every_steps": 10, "train__per_device_batch_size": 2}  # fmt: skip
    recipe = mixture(tmp_path, tiny_llama, **changes)
    said: list[str] = []
    train(recipe, say=said.append)
    run = Path(recipe.train.output_dir)
    expected = "train: rows are drawn by weight, and a source starts again at its end: 12.5% from "
    assert any(line.startswith(expected) for line in said)
    tokens = run_json(run)["trained_tokens"]
    if not packing:  # 120 rows, of which the steps of a window may take any
        assert tokens == pytest.approx(120 * (2 + 2 * 8 + 5 * 58) / 8, rel=0.1)
    assert adapter_bytes(resumed(recipe, 55)) == adapter_bytes(run)


def test_a_run_resumes_only_with_the_same_mixture(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = mixture(tmp_path, tiny_llama, train__max_steps=4, train__epochs=None)
    train(recipe)
    changed = json.loads(json.dumps(recipe.resolved()["task"]["path"]))
    changed[0]["weight"] = 3
    with pytest.raises(UserError, match=r"the recipe differs from .*: task\.path: was "):
        resumed(recipe, 2, **{"task.path": changed})
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "b.jsonl", [*rows[1:], rows[0]])
    with pytest.raises(UserError, match="the train data has changed since the run started"):
        resumed(recipe, 2)
    assert not Path(recipe.train.output_dir).with_name("from-2").exists()


def test_a_dry_run_plans_the_epoch(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = mixture(tmp_path, tiny_llama, train__epochs=1)
    said: list[str] = []
    found = dry_run(recipe, said.append)
    assert (found["steps_per_epoch"], found["train_rows"]) == (6, 48)
    assert any("an epoch draws 48 rows by weight" in line for line in said)


def test_bad_rows_count_for_no_source(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = mixture(tmp_path, tiny_llama, train__epochs=1, task__on_bad_row="skip")
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "c.jsonl", [{**rows[0], "completion": ""}] * 20 + rows[20:])
    train(recipe)
    sources = run_json(Path(recipe.train.output_dir))["data"]["train"]["sources"]
    assert [(s["rows"], s["rows_per_epoch"]) for s in sources] == [(40, 2), (20, 4), (10, 10)]
    write_rows(tmp_path / "c.jsonl", [{**rows[0], "completion": ""}] * 20)
    with pytest.raises(UserError, match=r"c\.jsonl: all 20 rows are bad"):
        train(recipe, overwrite=True)
