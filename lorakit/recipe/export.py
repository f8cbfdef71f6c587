"""Write recipes as YAML, and the JSON schema from which editors complete them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lorakit import registry
from lorakit.io.atomic import write_text
from lorakit.recipe.data_path import DataSource
from lorakit.recipe.key_descriptions import describe_keys
from lorakit.recipe.load import escape
from lorakit.recipe.sections import (
    AdapterSection,
    ModelSection,
    Recipe,
    Section,
    TaskSection,
    TrainSection,
)
from lorakit.recipe.yaml_source import read_scalar

#: The adapter keys to write first, in the order of the documentation.
_FIRST = (
    "method",
    "init_from",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "target_parameters",
    "layers",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "bias",
    "use_rslora",
    "init",
)


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe as UTF-8 YAML that loads as an equal recipe.

    The write is atomic.
    """
    write_text(Path(path), recipe_text(recipe))


def recipe_text(recipe: Recipe) -> str:
    """Return the YAML text that ``write_recipe`` writes."""
    sections = _escaped(recipe.resolved())
    adapter = sections["adapter"]
    first = {key: adapter.pop(key) for key in _FIRST if key in adapter}
    sections["adapter"] = {**first, **adapter}
    return _dumped(sections)


def sections_text(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Return YAML text of the given keys of each section, one key per line."""
    return _dumped({name: _Block(_escaped(dict(keys))) for name, keys in sections.items()})


def yaml_text(data: Mapping[str, Any]) -> str:
    """Return YAML text from which ``read_yaml`` and ``expand_environment`` read ``data``."""
    return _dumped(_escaped(dict(data)))


def _dumped(data: Any) -> str:
    text: str = yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=2**20,
    )
    return text


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return escape(value) if isinstance(value, str) else value


class _Dumper(yaml.SafeDumper):
    """Writes no aliases; strings that ``read_scalar`` would convert are quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Block(dict[str, Any]):
    """A mapping that is written with a line per key, even if all values are scalars."""


def _represent_block(dumper: _Dumper, data: _Block) -> yaml.MappingNode:
    return dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=False)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    plain = isinstance(read_scalar(text), str) and text.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(_Block, _represent_block)


_ABOUT_ADAPTER = "How the model is adapted: a method and its keys."
_ABOUT_TASK = "What the model learns: a task, its data and its keys."
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes with any built-in or user method and task.

    ``adapter`` and ``task`` are unions, discriminated by ``method`` and ``name``.
    """
    methods, tasks = registry.methods(), _distinct(registry.tasks())
    classes: list[type[Section]] = [ModelSection, AdapterSection, TaskSection, TrainSection]
    classes += [method.Config for method in methods.values()]
    classes += [task.Config for task in tasks]
    references, top = models_json_schema(
        [(section, "validation") for section in dict.fromkeys(classes)],
        ref_template="#/$defs/{model}",
    )
    definitions: dict[str, Any] = top["$defs"]
    described: list[type[BaseModel]] = [*classes, DataSource]
    for section in described:
        describe_keys(section, definitions[section.__name__])

    def of(section: type[Section]) -> dict[str, Any]:
        reference = references[section, "validation"]["$ref"]
        found: dict[str, Any] = definitions[reference.rsplit("/", 1)[1]]
        return found

    adapters = [_named(of(m.Config), "method", (name,), m.summary) for name, m in methods.items()]
    user_method = _user_file(of(AdapterSection), "method", r"\.py:", "./FILE.py:CLASS")
    named_tasks = [_named(of(task.Config), "name", task.names, task.summary) for task in tasks]
    forms = "./FILE.py:CLASS or ./FILE.yaml"
    user_task = _user_file(of(TaskSection), "name", r"\.py:|\.ya?ml$", forms)
    return {
        "$schema": DIALECT,
        "title": "lorakit recipe",
        "type": "object",
        "additionalProperties": False,
        "required": list(Recipe.model_fields),
        "properties": {
            "model": of(ModelSection),
            "adapter": {"description": _ABOUT_ADAPTER, "anyOf": [*adapters, user_method]},
            "task": {"description": _ABOUT_TASK, "anyOf": [*named_tasks, user_task]},
            "train": of(TrainSection),
        },
        "$defs": definitions,
    }


def _user_file(schema: dict[str, Any], key: str, pattern: str, forms: str) -> dict[str, Any]:
    """Return the section's schema for a user's file, which may define further keys."""
    name: dict[str, Any] = {"type": "string", "pattern": pattern, "description": forms}
    return {
        **schema,
        "properties": {**schema["properties"], key: name},
        "required": [key],
        "additionalProperties": True,
    }


def _distinct(tasks: dict[str, Any]) -> list[Any]:
    """Each task once, also if it has several names."""
    return list({id(task): task for task in tasks.values()}.values())


def _named(
    schema: dict[str, Any], key: str, names: tuple[str, ...], summary: str
) -> dict[str, Any]:
    """Return the section's schema with ``key`` restricted to ``names``."""
    default = schema["properties"][key].get("default")
    name: dict[str, Any] = {"enum": list(names), "description": summary}
    required = set(schema.get("required", ()))
    # Without `method`, exactly one branch must match: that of the default.
    if key == "method" and names == ("lora",):
        name["default"] = default
    else:
        required.add(key)
    properties = {**schema["properties"], key: name}
    return {**schema, "properties": properties, "required": sorted(required)}
