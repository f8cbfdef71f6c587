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
SOURCES: list[Any] = [
    [{"path": "a.jsonl", "weight": 0.5}],
    ["a.jsonl", {"path": ["b.jsonl", "c-*.csv"], "weight": 2}],
    {"path": "a.jsonl", "weight": 1},
    {"path": "org/set", "name": "config", "split": "train"},
    {"train": [{"path": "a.jsonl", "weight": 0.5}, "b"], "validation": "v.jsonl"},
    {"train": {"path": "org/set", "split": "train"}, "dev": {"path": "org/set", "split": "test"}},
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


@pytest.mark.parametrize("path", SOURCES, ids=json.dumps)
def test_sources(tmp_path: Path, path: Any) -> None:
    recipe = lorakit.load_recipe(recipe_file(tmp_path, path))
    assert recipe.resolved()["task"]["path"] == path
    write_recipe(recipe, tmp_path / "written.yaml")
    assert lorakit.load_recipe(tmp_path / "written.yaml") == recipe
    override = [f"task.path={json.dumps(path)}"]
    assert lorakit.load_recipe(recipe_file(tmp_path, "other"), override) == recipe


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ({"path": "a", "weight": 0}, 'source "a": weight = 0; allowed: a number > 0'),
        ([{"path": "a", "weight": -1}], 'source "a": weight = -1; allowed: a number > 0'),
        ([{"path": "a", "weight": "2"}], 'weight = "2"; allowed: a number > 0'),
        ([{"path": "a", "weight": True}], "weight = true; allowed: a number > 0"),
        ({"train": [{"path": "a", "weigth": 2}]}, "unknown key 'weigth' (did you mean 'weight'?)"),
        ({"path": "a", "train": "b"}, "unknown key 'train'; allowed: path, name, split, weight"),
        ({"name": "org/set", "split": "train"}, "a source without path; allowed: path, name, "),
        ([{"path": [], "weight": 1}], "path = []; allowed: a file, a glob, a directory or a list"),
        ([{"path": "a", "split": 3}], "split = 3; allowed: the name of a split"),
        ({"validation": [{"path": "a", "weight": 1}]}, "the sources of validation have weights"),
    ],
    ids=str,
)
def test_wrong_sources_are_named(tmp_path: Path, path: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        lorakit.load_recipe(recipe_file(tmp_path, path))
    (problem,) = caught.value.problems
    assert problem.key == "task.path"
    assert message in str(problem)
    assert "\n" not in str(problem)


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
    """The same names are rejected in training; evaluation does not need a training split."""
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
    source = {"$ref": "#/$defs/DataSource"}
    sources = {"type": "array", "minItems": 1, "items": {"anyOf": [text, source]}}
    files = {"anyOf": [text, source, sources]}
    mapping = {"type": "object", "minProperties": 1, "additionalProperties": files}
    allowed = found["properties"]["path"]["anyOf"]
    assert allowed == [text, source, sources, mapping, {"type": "null"}]
