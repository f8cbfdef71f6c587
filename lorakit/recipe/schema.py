"""The recipe's JSON schema, from which editors complete keys and check values."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from lorakit import registry
from lorakit.recipe.sections import ModelSection, Recipe, Section, TrainSection

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """One schema for every method and task: ``adapter`` and ``task`` are any of theirs, told
    apart by ``method`` and ``name``."""
    methods, tasks = registry.methods(), _distinct(registry.tasks())
    classes: list[type[Section]] = [ModelSection, TrainSection]
    classes += [method.Config for method in methods.values()]
    classes += [task.Config for task in tasks]
    references, top = models_json_schema(
        [(section, "validation") for section in dict.fromkeys(classes)],
        ref_template="#/$defs/{model}",
    )
    definitions: dict[str, Any] = top["$defs"]

    def of(section: type[Section]) -> dict[str, Any]:
        reference = references[section, "validation"]["$ref"]
        found: dict[str, Any] = definitions[reference.rsplit("/", 1)[1]]
        return found

    adapters = [_named(of(m.Config), "method", (name,), m.summary) for name, m in methods.items()]
    named_tasks = [_named(of(task.Config), "name", task.names, task.summary) for task in tasks]
    return {
        "$schema": DIALECT,
        "title": "lorakit recipe",
        "type": "object",
        "additionalProperties": False,
        "required": list(Recipe.model_fields),
        "properties": {
            "model": of(ModelSection),
            "adapter": {"anyOf": adapters},
            "task": {"anyOf": [*named_tasks, _own_task()]},
            "train": of(TrainSection),
        },
        "$defs": definitions,
    }


def _own_task() -> dict[str, Any]:
    """A task in a file of the user's, whose keys only the file knows."""
    name: dict[str, Any] = {
        "type": "string",
        "pattern": r"\.py:|\.ya?ml$",
        "description": "your own: ./FILE.py:CLASS or ./FILE.yaml",
    }
    return {
        "type": "object",
        "properties": {"name": name},
        "additionalProperties": True,
        "required": ["name"],
    }


def _distinct(tasks: dict[str, Any]) -> list[Any]:
    """Each task once, whatever the number of its names."""
    return list({id(task): task for task in tasks.values()}.values())


def _named(
    schema: dict[str, Any], key: str, names: tuple[str, ...], summary: str
) -> dict[str, Any]:
    """The section's schema for these names alone."""
    default = schema["properties"][key].get("default")
    name: dict[str, Any] = {"enum": list(names), "description": summary}
    required = set(schema.get("required", ()))
    # Only the general default may be left out, so that exactly one method matches without it.
    if key == "method" and names == ("lora",):
        name["default"] = default
    else:
        required.add(key)
    properties = {**schema["properties"], key: name}
    return {**schema, "properties": properties, "required": sorted(required)}
