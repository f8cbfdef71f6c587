"""Runs that hold out a share of their training rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.errors import DataError, RecipeError, UserError
from lorakit.pipeline.task_data import load_task_data, load_training_data
from lorakit.recipe.sections import Recipe
from lorakit.training.run import train
from tests.training.runs import (
    adapter_bytes,
    class_rows,
    completion_rows,
    eval_lines,
    recipe_for,
    run_json,
    write_rows,
)


def shared(folder: Path, model: Path, task: str = "completion", **changes: Any) -> Recipe:
    """Hold out a fifth of 40 rows."""
    rows: Any = completion_rows(40) if task == "completion" else class_rows(40)
    write_rows(folder / "all.jsonl", [{**row, "id": str(n)} for n, row in enumerate(rows)])
    settings = {"task__path": str(folder / "all.jsonl"), "task__validation_share": 0.2}
    return recipe_for(folder, model, task, **settings | changes)


def ids(split: Any) -> list[str]:
    return [row["id"] for row in split.rows]


def silent(text: str) -> None:
    """Takes notes that a test does not read."""


def test_a_run_evaluates_on_held_out_rows(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = shared(tmp_path, tiny_llama, train__save_total_limit=None)
    said: list[str] = []
    train(recipe, say=said.append)
    assert "8 of 40 rows held out for validation (task.validation_share)" in said
    run = Path(recipe.train.output_dir)
    data = run_json(run)["data"]
    assert (data["train"]["rows"], data["validation"]["rows"]) == (32, 8)
    assert data["train"]["fingerprint"] != data["validation"]["fingerprint"]
    found = lorakit.evaluate(recipe, adapter=run / "adapter")
    best = min(line["eval"]["loss"] for line in eval_lines(run))
    assert found["loss"] == pytest.approx(best)
    other = lorakit.load_recipe(run / "recipe.yaml", {"train.output_dir": str(tmp_path / "other")})
    train(other, resume=str(run / "checkpoints" / "step-4"))
    assert adapter_bytes(tmp_path / "other") == adapter_bytes(run)
    changed = lorakit.load_recipe(
        run / "recipe.yaml",
        {"train.output_dir": str(tmp_path / "third"), "task.validation_share": 0.3},
    )
    with pytest.raises(UserError, match=r"task\.validation_share: was 0\.2, now 0\.3"):
        train(changed, resume=str(run / "checkpoints" / "step-4"))


def test_every_command_sees_the_same_parts(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = shared(tmp_path, tiny_llama, task__limit_eval=6)
    data = load_training_data(recipe, silent)
    assert data.validation is not None
    whole = lorakit.load_recipe(
        tmp_path / "recipe.yaml", {"task.limit_eval": None, "train.seed": 9}
    )
    held_out = load_task_data(whole, say=silent).split
    assert len(held_out) == 8
    assert sorted([*ids(data.split), *ids(held_out)]) == sorted(map(str, range(40)))
    assert (
        ids(data.validation) == ids(held_out)[:6] == ids(load_task_data(recipe, say=silent).split)
    )
    assert ids(load_task_data(recipe, "train", say=silent).split) == ids(data.split)
    assert ids(load_task_data(recipe, "train", limit=3, say=silent).split) == ids(data.split)[:3]
    assert ids(load_task_data(recipe, limit=7, say=silent).split) == ids(held_out)[:7]
    row = int(ids(held_out)[2])
    assert held_out.locate(2) == f"{tmp_path}/all.jsonl, row {row + 1}"


def test_classes_keep_their_share(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": "rare" if n % 10 == 0 else "often"} for n in range(100)]
    write_rows(tmp_path / "all.jsonl", rows)
    changes = {"task__path": str(tmp_path / "all.jsonl"), "task__validation_share": 0.1}
    data = load_training_data(recipe_for(tmp_path, tiny_bert, "classification", **changes), silent)
    assert data.validation is not None
    assert Counter(data.validation.column("label")) == {"often": 9, "rare": 1}
    assert Counter(data.split.column("label")) == {"often": 81, "rare": 9}
    assert data.labels == ["often", "rare"]
    changes |= {"task__regression": True}
    write_rows(tmp_path / "all.jsonl", [{**row, "label": n / 7} for n, row in enumerate(rows)])
    data = load_training_data(recipe_for(tmp_path, tiny_bert, "classification", **changes), silent)
    assert data.validation is not None
    assert len(data.validation) == 10


def test_sources_keep_their_share(tiny_llama: Path, tmp_path: Path) -> None:
    path = []
    for name, count in (("a", 30), ("b", 10), ("c", 1)):
        write_rows(tmp_path / f"{name}.jsonl", completion_rows(count))
        path.append({"path": str(tmp_path / f"{name}.jsonl"), "weight": 1})
    recipe = shared(tmp_path, tiny_llama, task__path=path, train__epochs=1)
    data = load_training_data(recipe, silent)
    assert data.validation is not None
    assert [count for _, count in data.validation.files] == [6, 2, 0]
    train(recipe)
    found = run_json(Path(recipe.train.output_dir))["data"]
    sources = [(source["rows"], source["rows_per_epoch"]) for source in found["train"]["sources"]]
    assert sources == [(24, 1), (8, 1), (1, 1)]
    assert "sources" not in found["validation"]


def test_a_limit_keeps_rows_of_each_source(tiny_llama: Path, tmp_path: Path) -> None:
    path = []
    for name, weight in (("a", 1), ("b", 3)):
        write_rows(tmp_path / f"{name}.jsonl", completion_rows(20))
        path.append({"path": str(tmp_path / f"{name}.jsonl"), "weight": weight})
    recipe = shared(tmp_path, tiny_llama, task__path=path)
    for limit, counts in ((8, [2, 6]), (1, [1, 1]), (30, [8, 16]), (99, [16, 16])):
        split = load_task_data(recipe, "train", limit=limit, say=silent).split
        assert [source.rows for source in split.sources] == counts
    assert len(load_task_data(recipe, limit=3, say=silent).split) == 3


def test_labels_without_two_equal_rows_are_held_out(tiny_bert: Path, tmp_path: Path) -> None:
    columns = [f"c{n}" for n in range(6)]
    rows = [
        {"text": f"t{n}", **{name: n >> i & 1 for i, name in enumerate(columns)}} for n in range(40)
    ]
    write_rows(tmp_path / "all.jsonl", rows)
    changes = {
        "task__path": str(tmp_path / "all.jsonl"),
        "task__validation_share": 0.2,
        "task__label_columns": columns,
    }
    data = load_training_data(recipe_for(tmp_path, tiny_bert, "classification", **changes), silent)
    assert data.validation is not None
    assert (len(data.split), len(data.validation)) == (32, 8)


def test_bad_rows_are_skipped_and_never_held_out(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = shared(tmp_path, tiny_llama, task__on_bad_row="skip", train__epochs=1)
    good = [json.dumps(row) for row in completion_rows(20)]
    bad = ["not JSON", json.dumps({"prompt": "a", "completion": ""})] * 10
    lines = [line for pair in zip(good, bad, strict=True) for line in pair]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    train(recipe)
    data = run_json(Path(recipe.train.output_dir))["data"]
    assert (data["train"]["rows"], data["train"]["skipped_rows"]) == (36, 20)
    assert (data["validation"]["rows"], data["validation"]["skipped_rows"]) == (4, 0)
    assert set(lorakit.evaluate(recipe)) == {"loss", "perplexity"}


def test_no_row_that_can_be_held_out(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = shared(tmp_path, tiny_llama, task__on_bad_row="skip")
    write_rows(tmp_path / "all.jsonl", [{"prompt": "a", "completion": ""}] * 9)
    with pytest.raises(
        DataError, match=r"= 0\.2: too small to hold out any of 0 rows that are not bad"
    ):
        load_training_data(recipe, silent)


def test_validation_data_besides_the_share(tiny_llama: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "both" / "train.jsonl", completion_rows(9))
    write_rows(tmp_path / "both" / "dev.jsonl", completion_rows(3))
    recipe = shared(tmp_path, tiny_llama, task__path=str(tmp_path / "both"))
    expected = (
        r"^task\.validation_share = 0\.2: there is a validation split already \(.*dev\.jsonl\)"
    )
    with pytest.raises(DataError, match=expected):
        train(recipe)
    with pytest.raises(DataError, match=expected):
        load_task_data(recipe, "train", say=silent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task__path": {"train": "a", "dev": "b"}},
            "task.path has validation data already, as 'd",
        ),
        ({"task__streaming": True, "train__max_steps": 3}, "not supported with task.streaming"),
        ({"task__validation_share": 0}, "out of range; allowed: a number > 0 and < 1"),
        ({"task__validation_share": 1}, "out of range; allowed: a number > 0 and < 1"),
        ({"task__validation_share": "5%"}, "task.validation_share"),
    ],
)
def test_settings_that_are_refused(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        shared(tmp_path, tiny_llama, **changes)
    assert message in str(caught.value)


def test_a_share_of_less_than_a_row(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = shared(tmp_path, tiny_llama, task__validation_share=0.01)
    with pytest.raises(
        DataError, match=r"^task\.validation_share = 0\.01: too small to hold out any of 40 rows"
    ):
        train(recipe)
    assert not Path(recipe.train.output_dir).exists()
