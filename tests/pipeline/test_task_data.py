"""Which rows and class names a command gets from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import DataError, UserError
from lorakit.pipeline.task_data import load_task_data, load_training_data
from lorakit.recipe.sections import Recipe
from tests.training.runs import completion_rows, recipe_for, write_rows

ROWS = [{"text": f"row {i}", "label": ("no", "yes", "maybe")[i % 3]} for i in range(6)]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A classification whose class names are in the data, on a base that is never loaded."""
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    write_rows(tmp_path / "data" / "validation.jsonl", ROWS[:4])
    return recipe_for(tmp_path, tmp_path / "no-model", "classification")


def quiet(_note: str) -> None:
    pass


def test_the_split_is_the_tasks_own_by_default(recipe: Recipe) -> None:
    data = load_task_data(recipe, say=quiet)
    assert (data.split.name, len(data.split)) == ("validation", 4)
    assert data.labels == data.config.labels == ["maybe", "no", "yes"]
    assert data.validation is None and data.stream is None


def test_limit_overrides_the_recipe(recipe: Recipe) -> None:
    limited = recipe.model_copy(
        update={"task": recipe.task.model_copy(update={"limit_train": 3, "limit_eval": 3})}
    )
    assert len(load_task_data(limited, "train", say=quiet).split) == 3
    data = load_task_data(limited, "train", limit=5, say=quiet)
    assert len(data.split) == 5
    assert data.config.limit_train == 3, "the recipe itself is not changed"


def test_an_adapters_labels_are_kept_in_their_order(recipe: Recipe) -> None:
    data = load_task_data(recipe, trained_labels=["yes", "no", "maybe"], say=quiet)
    assert data.labels == ["yes", "no", "maybe"]


def test_training_reads_both_splits(recipe: Recipe) -> None:
    data = load_training_data(recipe, quiet)
    assert (data.split.name, len(data.split)) == ("train", 6)
    assert data.validation is not None and len(data.validation) == 4
    assert data.labels == ["maybe", "no", "yes"]


def test_a_missing_split_is_named(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "data" / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"no split 'train'; allowed: validation"):
        load_task_data(recipe, "train", say=quiet)
    with pytest.raises(DataError, match=r"no split 'train'; allowed: validation"):
        load_training_data(recipe, quiet)


def test_bad_rows_are_skipped_only_where_rows_are_not_scored(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*completion_rows(3), {"prompt": "a", "completion": 3}]
    for name in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    recipe = recipe_for(tmp_path, tmp_path / "no-model", "completion", task__on_bad_row="skip")
    assert load_training_data(recipe, quiet).skip_bad_rows
    assert load_task_data(recipe, "train", skip_bad_rows=True, say=quiet).skip_bad_rows
    assert not load_task_data(recipe, "train", say=quiet).skip_bad_rows
    assert not load_task_data(recipe, "validation", skip_bad_rows=True, say=quiet).skip_bad_rows


def test_a_stream_is_opened_for_training_alone(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", completion_rows(300))
    recipe = recipe_for(
        tmp_path, tmp_path / "no-model", "completion",
        task__streaming=True, train__max_steps=2, train__epochs=None,
    )  # fmt: skip
    data = load_training_data(recipe, quiet)
    assert data.stream is not None
    assert len(data.split) == 200, "the rows that the task looks at"
    assert len(list(data.stream.read())) == 300
    assert load_task_data(recipe, "train", say=quiet).stream is None


def test_a_format_of_its_own_cannot_be_streamed(tmp_path: Path) -> None:
    recipe = recipe_for(
        tmp_path, tmp_path / "no-model", "wikisql",
        task__streaming=True, train__max_steps=2, train__epochs=None,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"task\.streaming = true: wikisql .* allowed: false"):
        load_training_data(recipe, quiet)
