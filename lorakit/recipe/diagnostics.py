"""Describe what is wrong with a recipe: the key, the value found, and what is allowed.

Validation errors of pydantic become one fault per key. What is allowed is read from the section's
JSON schema, so that a union has one description instead of an error per branch. Unknown keys get
the nearest known key as a suggestion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from lorakit import registry
from lorakit.errors import Problem, did_you_mean, nearest, shown
from lorakit.recipe.sections import ModelSection, Recipe, TrainSection
from lorakit.recipe.yaml_source import KeyPath, YamlFile, dotted, read_scalar

#: The source that messages name for values from the command line or from ``overrides``.
OVERRIDE = "--set"

#: Common short names, which string similarity does not find; those of other tools are in ``peers``.
SYNONYMS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lr": "learning_rate",
    "bs": "per_device_batch_size",
    "train_batch_size": "per_device_batch_size",
}

_KINDS = {
    type(None): ("null", "null"),
    bool: ("boolean", "true or false"),
    int: ("integer", "an integer"),
    float: ("number", "a float"),
    str: ("string", "a string"),
    list: ("array", "a list"),
    dict: ("object", "a mapping"),
}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
_PLURALS = {
    "an integer": "integers",
    "a number": "numbers",
    "a non-empty string": "strings",
    "a string": "strings",
    "a non-empty list": "lists",
    "a list": "lists",
}


@dataclass(frozen=True)
class Fault:
    """A problem with the value at ``path``, not yet located in a file.

    ``file`` overrides the file to which the path leads.
    """

    path: KeyPath
    message: str
    value: object = None
    has_value: bool = False
    allowed: str | None = None
    file: str | None = None

    def locate(self, source: YamlFile) -> Problem:
        """Return the problem with file and line: those of the nearest enclosing key in the file."""
        file, line = (self.file, None) if self.file else locate(source, self.path)
        return Problem(
            dotted(self.path), self.message, self.value, self.has_value, self.allowed, line, file
        )


def locate(source: YamlFile, path: KeyPath) -> tuple[str, int | None]:
    """Return the file and line that set ``path``, or the nearest enclosing key that is set."""
    for length in range(len(path), -1, -1):
        if path[:length] in source.overridden:
            return OVERRIDE, None
    if path not in source.lines and any(key[: len(path)] == path for key in source.overridden):
        return OVERRIDE, None
    for length in range(len(path), 0, -1):
        if path[:length] in source.lines:
            return source.file, source.lines[path[:length]]
    return source.file, None


def leading_key(message: str, recipe: Recipe) -> KeyPath | None:
    """Return the path of the recipe key that ``message`` starts with, or None."""
    match = re.match(r"(\w+)\.(\w+)", message)
    if match is None or match[1] not in Recipe.model_fields:
        return None
    section: BaseModel = getattr(recipe, match[1])
    return match.groups() if match[2] in type(section).model_fields else None


def with_value(message: str, key: KeyPath, recipe: Recipe) -> str:
    """Add the value to a message that starts with ``key`` alone."""
    section, name = key
    start = f"{section}.{name}: "
    if not message.startswith(start):
        return message
    values = getattr(recipe, str(section)).model_dump(mode="json", exclude_none=True)
    value = values.get(name)
    problem = message.removeprefix(start).removeprefix(f"{value}: ")
    return f"{section}.{name} = {shown(value)}: {problem}"


def explain(
    section: type[BaseModel], data: Mapping[str, Any], error: ValidationError
) -> list[Fault]:
    """Return the faults of ``data``, with paths relative to the section.

    Unknown keys of the section itself are left to the caller.
    """
    faults: dict[KeyPath, Fault] = {}
    for detail in error.errors(include_url=False):
        path, value = _walk(data, detail["loc"])
        if detail["type"] == "extra_forbidden" and len(path) == 1:
            continue
        schema = schema_at(section, path)
        if detail["type"] == "missing" and path == detail["loc"][:-1]:
            path = (*path, detail["loc"][-1])
            allowed = describe(schema_at(section, path))
            fault = Fault(path, "required key is missing", allowed=allowed)
        elif detail["type"] == "extra_forbidden":
            fault = Fault(path, "unknown key", value, True)
        elif detail["type"] in ("value_error", "assertion_error"):
            fault = Fault(path, str(detail["ctx"]["error"]), value, bool(path))
        else:
            allowed = describe(schema)
            fault = Fault(path, _mismatch(value, schema), value, True, allowed)
        faults.setdefault(path, fault)
    return list(faults.values())


def _walk(data: Any, loc: tuple[int | str, ...]) -> tuple[KeyPath, Any]:
    """Follow ``loc`` through ``data``; its remaining parts name the branches of a union."""
    path: KeyPath = ()
    for part in loc:
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if not inside:
            break
        data, path = data[part], (*path, part)
    return path, data


@cache
def _schema(section: type[BaseModel]) -> dict[str, Any]:
    return section.model_json_schema()


def schema_at(section: type[BaseModel], path: KeyPath) -> dict[str, Any]:
    """Return the JSON schema of the value at ``path`` with references resolved, {} if none."""
    root = _schema(section)
    schema = root
    for part in path:
        options = [_resolve(option, root) for option in schema.get("anyOf", [schema])]
        schema = next(filter(None, (_child(option, part) for option in options)), {})
        schema = _resolve(schema, root)
    if "anyOf" not in schema:
        return schema
    return {**schema, "anyOf": [_resolve(option, root) for option in schema["anyOf"]]}


def _resolve(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return root["$defs"][reference.rsplit("/", 1)[1]] if reference else schema


def _child(schema: dict[str, Any], part: int | str) -> dict[str, Any] | None:
    if isinstance(part, int):
        child = schema.get("items")
    else:
        child = schema.get("properties", {}).get(part, schema.get("additionalProperties"))
    return child if isinstance(child, dict) else None


def describe(schema: dict[str, Any]) -> str | None:
    """Describe what a JSON schema allows: ``a number > 0 or null``."""
    if "anyOf" in schema:
        parts = [part for option in schema["anyOf"] if (part := describe(option))]
        return " or ".join(dict.fromkeys(parts)) or None
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        bounds = [f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema]
        noun = "an integer" if kind == "integer" else "a number"
        return f"{noun} {' and '.join(bounds)}".strip()
    if kind == "string":
        return "a non-empty string" if schema.get("minLength") else "a string"
    if kind == "array":
        least = schema.get("minItems", 0)
        noun = "a non-empty list" if least == 1 else "a list"
        of = _each("of", schema.get("items"))
        return noun + of + (f" with at least {least} elements" if least > 1 else "")
    if kind == "object":
        if "properties" in schema:
            return f"a mapping with {', '.join(schema['properties'])}"
        return "a mapping" + _each("of names to", schema.get("additionalProperties"))
    return {"boolean": "true or false", "null": "null"}.get(str(kind))


def _each(link: str, schema: Any) -> str:
    text = describe(schema) if isinstance(schema, dict) else None
    if not text:
        return ""
    for singular, plural in _PLURALS.items():
        text = text.replace(singular, plural)
    return f" {link} {text}"


def _mismatch(value: Any, schema: dict[str, Any]) -> str:
    options = schema.get("anyOf", [schema])
    kinds = {option.get("type") for option in options}
    names = [name for o in options for name in o.get("enum", [o["const"]] if "const" in o else [])]
    kind, word = _KINDS.get(type(value), ("", type(value).__name__))
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    if kind == "string":
        return _mismatched_string(value, kinds, names)
    if kind in ("array", "object") and kind in kinds:
        return "contains an invalid value" if value else "must not be empty"
    if kind in kinds or (kind == "integer" and "number" in kinds):
        return "out of range"
    return f"wrong type ({word})"


def _mismatched_string(value: str, kinds: set[Any], names: list[str]) -> str:
    plain = _KINDS[type(read_scalar(value))][0]
    if plain != "string" and (plain in kinds or (plain == "integer" and "number" in kinds)):
        return "a quoted value is a string; remove the quotes"
    if names:
        return did_you_mean("unknown value", value, names)
    if "string" in kinds:
        return "invalid value" if value else "must not be empty"
    return "wrong type (a string)"


def unknown_sections(data: Mapping[str, object]) -> list[Fault]:
    """Return a fault for each top-level key that is not a section."""
    known = tuple(Recipe.model_fields)
    faults = []
    for key, value in data.items():
        if key in known:
            continue
        place = _elsewhere(key, "") or _of_another_tool(key, value)
        near = None if place else nearest(key, known)
        hint = f" (did you mean {near!r}?)" if near else f"; {place}" if place else ""
        faults.append(Fault((key,), f"unknown section{hint}", allowed=", ".join(known)))
    return faults


def unknown_key(section: str, key: str, value: object, known: Collection[str]) -> Fault:
    """Return the fault of a key that ``section`` does not have: with what to write instead, or, if
    nothing resembles it, with all keys that the section has."""
    if hint := _hint(section, key, value, known):
        return Fault((section, key), f"unknown key ({hint})", value, True)
    return Fault((section, key), "unknown key", value, True, ", ".join(known))


def _hint(section: str, key: str, value: object, known: Collection[str]) -> str | None:
    if place := _elsewhere(key, section):
        kin = [repr(name) for name in known if name.endswith(f"_{key}")]
        return f"did you mean {' or '.join(kin)}? {place}" if kin else place
    if key not in SYNONYMS and (place := _of_another_tool(key, value)):
        return place
    synonym = SYNONYMS.get(key, "")
    if synonym and synonym not in known and (place := _elsewhere(synonym, section)):
        return f"did you mean {synonym!r}? {place}"
    near = synonym if synonym in known else nearest(key, known)
    return f"did you mean {near!r}?" if near else None


def _of_another_tool(key: str, value: object) -> str | None:
    """What to write in place of another tool's key; the tables are only loaded for unknown keys."""
    from lorakit.recipe.peers.hints import hint

    return hint(key, value)


def _elsewhere(key: str, section: str) -> str | None:
    """Say which other section, method or task has ``key``, if one does."""
    for name, part in (("model", ModelSection), ("train", TrainSection)):
        if name != section and key in part.model_fields:
            return f"it belongs under {name}"
    for name, kind, owned in (
        ("adapter", "method", registry.methods()),
        ("task", "task", registry.tasks()),
    ):
        owners = [owner for owner, part in owned.items() if key in part.Config.model_fields]
        if owners and name != section:
            return f"it belongs under {name}"
        if owners:
            return f"it is a key of the {kind}{'s' * (len(owners) > 1)} {', '.join(owners)}"
    return None
