from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lorakit import registry
from lorakit.recipe.export import recipe_schema
from lorakit.recipe.sections import AdapterSection, ModelSection, TaskSection, TrainSection
from lorakit.recipe.yaml_source import read_yaml

REPO = Path(__file__).resolve().parents[2]


def alternatives(section: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = recipe_schema()["properties"][section]["anyOf"]
    return found


KEYS = {"adapter": "method", "task": "name"}


def user_file(section: str) -> dict[str, Any]:
    (found,) = [s for s in alternatives(section) if "pattern" in s["properties"][KEYS[section]]]
    return found


def test_every_method_has_its_keys() -> None:
    built_in = [s for s in alternatives("adapter") if s != user_file("adapter")]
    listed = {name: s for s in built_in for name in s["properties"]["method"]["enum"]}
    assert set(listed) == set(registry.methods())
    for name, method in registry.methods().items():
        assert set(listed[name]["properties"]) == set(method.Config.model_fields)
        assert ("method" in listed[name]["required"]) == (name != "lora")


def test_every_task_has_its_keys() -> None:
    built_in = [s for s in alternatives("task") if s != user_file("task")]
    listed = {name: s for s in built_in for name in s["properties"]["name"]["enum"]}
    assert set(listed) == set(registry.tasks())
    for name, task in registry.tasks().items():
        assert set(listed[name]["properties"]) == set(task.Config.model_fields)
        assert "name" in listed[name]["required"]


def test_the_fixed_sections() -> None:
    schema = recipe_schema()
    assert set(schema["properties"]["model"]["properties"]) == set(ModelSection.model_fields)
    assert set(schema["properties"]["train"]["properties"]) == set(TrainSection.model_fields)
    assert schema["required"] == ["model", "adapter", "task", "train"]


def test_unknown_keys_are_rejected() -> None:
    properties = recipe_schema()["properties"]
    sections = [properties["model"], properties["train"]]
    for section in [*sections, *alternatives("adapter"), *alternatives("task")]:
        files = (user_file("adapter"), user_file("task"))
        assert section["additionalProperties"] is (section in files)


@pytest.mark.parametrize(
    ("section", "files"),
    [("adapter", ["./my.py:My"]), ("task", ["./my_task.py:MyTask", "a/b.yaml", "b.yml"])],
)
def test_user_files(section: str, files: list[str]) -> None:
    schema, key = user_file(section), KEYS[section]
    pattern = schema["properties"][key]["pattern"]
    assert all(re.search(pattern, name) for name in files)
    known = registry.methods() if section == "adapter" else registry.tasks()
    assert not any(re.search(pattern, name) for name in known)
    general = AdapterSection if section == "adapter" else TaskSection
    assert set(schema["properties"]) == set(general.model_fields)
    assert schema["required"] == [key]


def test_every_reference_is_defined() -> None:
    schema = recipe_schema()

    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if "$ref" in value else []
            return own + [found for item in value.values() for found in references(item)]
        return (
            [found for item in value for found in references(item)]
            if isinstance(value, list)
            else []
        )

    for reference in references(schema):
        assert reference.removeprefix("#/$defs/") in schema["$defs"]


def properties(value: Any) -> list[tuple[str, dict[str, Any], bool]]:
    """All properties below ``value``: their names, schemas, and whether they are required."""
    if isinstance(value, list):
        return [found for item in value for found in properties(item)]
    if not isinstance(value, dict):
        return []
    own = value.get("properties", {}).items()
    found = [(name, schema, name in value.get("required", ())) for name, schema in own]
    return found + [inner for item in value.values() for inner in properties(item)]


def test_every_key_has_a_description_and_a_default() -> None:
    """The user's files in ``method`` and ``name`` have patterns instead."""
    found = properties(recipe_schema())
    assert len({name for name, _, _ in found}) > 100
    assert [name for name, schema, _ in found if len(schema.get("description", "")) < 8] == []
    assert [
        name for name, schema, required in found if not required and "default" not in schema
    ] == []


def test_a_description_is_that_of_the_class_that_declares_the_key_last() -> None:
    described = {
        schema["properties"]["method"]["enum"][0]: schema["properties"]["target_modules"][
            "description"
        ]
        for schema in alternatives("adapter")
        if schema != user_file("adapter")
    }
    assert described["lora"].startswith("The modules to adapt")
    assert described["full"] == "The modules whose own parameters are trained; null is all."


RECIPES = sorted(path for path in (REPO / "recipes").rglob("*.yaml") if "sweeps" not in path.parts)


def test_the_recipes_of_the_repository_fit_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    checked = 0
    for path in RECIPES:
        data = read_yaml(path).data
        if "model" in data:
            assert [error.message for error in validator.iter_errors(data)] == [], path
            data["train"]["epohcs"] = 1
            assert list(validator.iter_errors(data)), path
            checked += 1
    assert checked > 20


def test_it_is_json() -> None:
    assert json.loads(json.dumps(recipe_schema(), allow_nan=False)) == recipe_schema()
