"""A run reuses the tokens that an earlier run cached for the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.data.cache import CACHED_ROWS
from lorakit.recipe.load import load_recipe
from lorakit.training.run import dry_run, train
from tests.training.runs import completion_rows, write_recipe_file, write_rows


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path / "data" / "train.jsonl", completion_rows(CACHED_ROWS))
    write_rows(tmp_path / "data" / "validation.jsonl", completion_rows(8))
    changes: dict[str, Any] = {"train__epochs": None, "train__max_steps": 2}
    return write_recipe_file(tmp_path, tiny_llama, "completion", **changes)


def test_a_second_run_reads_the_cache_of_the_first(recipe_file: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def run(name: str, *changes: str) -> dict[str, float]:
        said.clear()
        output = f"train.output_dir={tmp_path / name}"
        return train(load_recipe(recipe_file, [output, *changes]), say=said.append).metrics

    def read() -> bool:
        return any("2,000 rows read from the cache" in text for text in said)

    assert dry_run(load_recipe(recipe_file), said.append)["first_loss"] > 0
    assert not (tmp_path / "cache").exists(), "a dry run writes nothing"
    first = run("first")
    assert any(text.startswith("train: 2,000 rows tokenized in ") for text in said)
    assert run("second") == first
    assert read()
    assert run("third", "task.max_length=30") != first
    assert not read()
    assert any("rows truncated to 30 tokens; " in text and "including EOS" in text for text in said)
    run("fourth", "task.limit_eval=4", "task.max_new_tokens=5")
    assert read()
