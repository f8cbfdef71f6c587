from __future__ import annotations

import json
import re
from typing import Any

from lorakit import registry
from lorakit.recipe.export import recipe_schema
from lorakit.recipe.sections import ModelSection, TrainSection


def alternatives(section: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = recipe_schema()["properties"][section]["anyOf"]
    return found


def test_every_method_stands_with_its_own_keys() -> None:
    listed = {
        name: s for s in alternatives("adapter") for name in s["properties"]["method"]["enum"]
    }
    assert set(listed) == set(registry.methods())
    for name, method in registry.methods().items():
        assert set(listed[name]["properties"]) == set(method.Config.model_fields)
        assert ("method" in listed[name]["required"]) == (name != "lora")


def own_file() -> dict[str, Any]:
    (found,) = [s for s in alternatives("task") if "pattern" in s["properties"]["name"]]
    return found


def test_every_task_stands_with_its_own_keys() -> None:
    built_in = [s for s in alternatives("task") if s != own_file()]
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


def test_unknown_keys_are_refused_everywhere() -> None:
    properties = recipe_schema()["properties"]
    sections = [properties["model"], properties["train"]]
    for section in [*sections, *alternatives("adapter"), *alternatives("task")]:
        assert section["additionalProperties"] is (section == own_file())


def test_a_file_of_the_users_is_a_task_too() -> None:
    pattern = own_file()["properties"]["name"]["pattern"]
    for name in ("./my_task.py:MyTask", "a/b.yaml", "b.yml"):
        assert re.search(pattern, name)
    assert not any(re.search(pattern, name) for name in registry.tasks())


def test_every_reference_leads_somewhere() -> None:
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


def test_it_is_json() -> None:
    assert json.loads(json.dumps(recipe_schema(), allow_nan=False)) == recipe_schema()
