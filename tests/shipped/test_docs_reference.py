"""docs/recipe-keys.md and docs/api.md: what scripts/docs_reference.py writes, and complete."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from types import ModuleType
from typing import Any

import pytest

import lorakit
from lorakit import registry
from lorakit.recipe.sections import ModelSection, TrainSection
from tests.shipped.test_docs import DOCS, REPO


@pytest.fixture(scope="module")
def script() -> ModuleType:
    file = REPO / "scripts" / "docs_reference.py"
    spec = importlib.util.spec_from_file_location("docs_reference", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["recipe-keys.md", "api.md"])
def test_the_pages_are_current(name: str, script: ModuleType) -> None:
    current = script.PAGES[name]()
    assert DOCS[f"docs/{name}"] == current, "run: python scripts/docs_reference.py"


def test_every_key_is_listed() -> None:
    configs: list[Any] = [ModelSection, TrainSection]
    configs += [method.Config for method in registry.methods().values()]
    configs += [task.Config for task in registry.tasks().values()]
    keys = {key for config in configs for key in config.model_fields} - {"method", "name"}
    assert sorted(key for key in keys if f"\n| `{key}` | " not in DOCS["docs/recipe-keys.md"]) == []


def test_every_call_is_listed() -> None:
    listed = re.findall(r"^### `lorakit\.(\w+)`$", DOCS["docs/api.md"], re.MULTILINE)
    assert sorted(listed) == sorted(set(lorakit.__all__) - {"nn"})


SIGNATURES = re.findall(
    r"^```py\n(def (\w+)\(.+?)\n```$", DOCS["docs/api.md"], re.MULTILINE | re.DOTALL
)


@pytest.mark.parametrize(("text", "name"), SIGNATURES, ids=[name for _, name in SIGNATURES])
def test_every_call_is_listed_with_its_parameters(text: str, name: str) -> None:
    [node] = ast.parse(text).body
    assert isinstance(node, ast.FunctionDef)
    listed, kinds = node.args, inspect.Parameter
    plain = [argument.arg for argument in listed.args]
    first = len(plain) - len(listed.defaults)
    expected = [(arg, kinds.POSITIONAL_OR_KEYWORD, at >= first) for at, arg in enumerate(plain)]
    if listed.vararg:
        expected.append((listed.vararg.arg, kinds.VAR_POSITIONAL, False))
    expected += [
        (argument.arg, kinds.KEYWORD_ONLY, default is not None)
        for argument, default in zip(listed.kwonlyargs, listed.kw_defaults, strict=True)
    ]
    if listed.kwarg:
        expected.append((listed.kwarg.arg, kinds.VAR_KEYWORD, False))
    found = inspect.signature(getattr(lorakit, name)).parameters.values()
    assert [(p.name, p.kind, p.default is not p.empty) for p in found] == expected


def test_a_signature_is_listed_for_every_call() -> None:
    names = {name for _, name in SIGNATURES}
    assert sorted(names) == sorted(set(lorakit.__all__) - {"nn", "LoraConfig"})


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer", "exclusiveMinimum": 0}, "integer from 1"),
        ({"type": "integer", "minimum": 0, "maximum": 5}, "integer from 0 to 5"),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "number from 0, below 1"),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, "text or `null`"),
        (
            {"anyOf": [{"type": "number", "minimum": 0}, {"type": "integer", "minimum": 0}]},
            "number from 0",
        ),
        ({"enum": ["a", "b"]}, "`a`, `b`"),
        ({"type": "array", "items": {"type": "string"}}, "list of text"),
    ],
)
def test_values(schema: dict[str, Any], text: str, script: ModuleType) -> None:
    assert script.values(schema, {}) == text
