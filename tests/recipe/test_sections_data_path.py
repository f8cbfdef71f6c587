"""The forms of ``task.path``, which are written as they were read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.errors import RecipeError
from lorakit.recipe.export import recipe_schema, write_recipe

FORMS: list[Any] = [
    "data",
    "data/train-*.jsonl",
    "data/**/[ab]?.json",
    ["a.jsonl", "b-*.parquet"],
    {"train": "a.jsonl"},
    {"train": ["a.jsonl", "*.csv"], "validation": "v.json"},
    {"train": "a-*-of-00002.jsonl", "dev": ["v.json", "w.tsv.gz"]},
    None,
]
WEIGHTED: list[Any] = [
    [{"path": "a.jsonl", "weight": 0.5}],
    ["a.jsonl", {"path": "b.jsonl", "weight": 2}],
    {"path": "a.jsonl", "weight": 1},
    {"train": [{"path": "a.jsonl", "weight": 0.5}, {"path": "b.jsonl", "weight": 0.5}]},
    {"train": {"path": "a.jsonl", "weight": 0.5}, "validation": "v.jsonl"},
]


def recipe_file(folder: Path, path: Any) -> Path:
    file = folder / "recipe.yaml"
    recipe = {
        "model": {"name_or_path": "x"},
        "adapter": {},
        "task": {"name": "completion", "path": path},
        "train": {"output_dir": "run"},
    }
    file.write_text(json.dumps(recipe))
    return file


@pytest.mark.parametrize("path", FORMS, ids=json.dumps)
def test_forms(tmp_path: Path, path: Any) -> None:
    recipe = lorakit.load_recipe(recipe_file(tmp_path, path))
    assert recipe.task.path == path
    write_recipe(recipe, tmp_path / "written.yaml")
    assert lorakit.load_recipe(tmp_path / "written.yaml") == recipe
    override = [f"task.path={json.dumps(path)}"]
    assert lorakit.load_recipe(recipe_file(tmp_path, "other"), override) == recipe


@pytest.mark.parametrize("path", WEIGHTED, ids=json.dumps)
def test_weights_are_rejected(tmp_path: Path, path: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        lorakit.load_recipe(recipe_file(tmp_path, path))
    (problem,) = caught.value.problems
    assert problem.key == "task.path"
    assert "weights are not supported" in str(problem)


@pytest.mark.parametrize(
    "path", [[], {}, "", [""], {"train": []}, {"train": ""}, {"train": {"a": "b"}}, [["a"]], 3]
)  # fmt: skip
def test_other_values_are_rejected(tmp_path: Path, path: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        lorakit.load_recipe(recipe_file(tmp_path, path))
    (problem,) = caught.value.problems
    assert problem.key.startswith("task.path")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            {"training": "a.jsonl"},
            "unknown split 'training' (did you mean 'train'?); allowed: train, valid",
        ),
        ({"train": "a.jsonl", "Test": "b.jsonl"}, "unknown split"),
        ({"validation": "a.jsonl", "dev": "b.jsonl"}, "validation and dev both name split 'v"),
    ],
)
def test_split_names(tmp_path: Path, path: Any, message: str) -> None:
    """The same names are rejected in training; evaluation does not need a train split."""
    with pytest.raises(RecipeError) as caught:
        lorakit.load_recipe(recipe_file(tmp_path, path))
    (problem,) = caught.value.problems
    assert problem.key == "task.path"
    assert message in str(problem)
    assert lorakit.load_recipe(recipe_file(tmp_path, {"test": "a.jsonl"})).task.name == "completion"


def test_the_schema_accepts_the_forms() -> None:
    tasks = recipe_schema()["properties"]["task"]["anyOf"]
    (found,) = [t for t in tasks if "completion" in t["properties"]["name"].get("enum", ())]
    text = {"type": "string", "minLength": 1}
    texts = {"type": "array", "minItems": 1, "items": text}
    files = {"anyOf": [text, texts]}
    mapping = {"type": "object", "minProperties": 1, "additionalProperties": files}
    allowed = found["properties"]["path"]["anyOf"]
    assert len(allowed) == 4
    assert all(form in allowed for form in (text, texts, mapping, {"type": "null"}))
