#!/usr/bin/env python
"""Write docs/recipe-keys.md from the JSON schema of recipes, and docs/api.md from the docstrings.

python scripts/docs_reference.py
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lorakit
from lorakit.recipe.export import recipe_schema

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTE = "<!-- written by scripts/docs_reference.py -->\n"
LORALIB = (
    "Linear", "Embedding", "MergedLinear", "Conv2d", "mark_only_lora_as_trainable",
    "lora_state_dict",
)  # fmt: skip
#: How the page presents the calls, in this order.
GROUPS = {
    "Train and evaluate": (
        "init_recipe",
        "load_recipe",
        "plan",
        "train",
        "evaluate",
        "predict",
        "sweep",
    ),
    "Load and adapt models": ("load", "load_with_tokenizer", "switch", "inject", "LoraConfig"),
    "Compare runs": ("report", "compare"),
    "Adapters": ("merge", "convert", "inspect", "export_gguf", "push_to_hub", "check_vllm"),
    "loralib": LORALIB,
}
RECIPE_INTRO = """
The keys of all methods and tasks with their values and defaults, generated from the JSON schema
that `lorakit schema` prints. The [recipe reference](recipe.md), the pages of the
[methods](methods.md) and [data](data.md) explain them.
"""
API_INTRO = """
The calls behind the commands of the command line. `import lorakit` loads no tensor library; each
name is imported when it is first used. Errors derive from `lorakit.errors.LorakitError`;
`UserError` and its subclasses mean that the input is wrong, and nothing has been written.

```python
import lorakit

recipe = lorakit.load_recipe("recipe.yaml", overrides={"train.output_dir": "runs/python"})
run = lorakit.train(recipe)
print(run.metrics, run.adapter_dir)
metrics = lorakit.evaluate(recipe, adapter=run.adapter_dir)
```
"""
OF_LORA_CONFIG = """
The keys of [LoRA](methods/lora.md#keys) as an object. Every method has such a class,
`lorakit.methods.NAME`, whose fields are its keys in a recipe.
"""
OF_LORALIB = """
For code that was written for Microsoft's loralib: `import lorakit as lora`.
"""
Schema = Mapping[str, Any]


def recipe_page() -> str:
    """Return docs/recipe-keys.md: every key of a recipe, its values and its default."""
    schema = recipe_schema()
    sections, definitions = schema["properties"], schema["$defs"]
    adapters, tasks = sections["adapter"]["anyOf"], sections["task"]["anyOf"]
    parts = ["# Every key of a recipe\n", NOTE + RECIPE_INTRO]
    parts += ["## `model`\n", _table(sections["model"], definitions)]
    for title, key, variants in (("adapter", "method", adapters), ("task", "name", tasks)):
        *named, user = variants
        shared = {name: user["properties"][name] for name in user["properties"] if name != key}
        common = {"properties": shared, "required": user["required"]}
        parts += [f"## `{title}`\n", f"Keys of every {key if key == 'method' else 'task'}:\n"]
        parts.append(_table(common, definitions))
        for variant in named:
            choices = variant["properties"][key]["enum"]
            parts.append(f"### `{title}.{key}`: {', '.join(f'`{choice}`' for choice in choices)}\n")
            page = f" See [its page](methods/{choices[0]}.md)." if key == "method" else ""
            parts.append(f"{_sentence(variant['properties'][key]['description'])}{page}\n")
            own = {
                name: value
                for name, value in variant["properties"].items()
                if name != key and shared.get(name) != value
            }
            parts.append(
                _table({**variant, "properties": own}, definitions)
                if own
                else "No keys of its own.\n"
            )
    parts += ["## `train`\n", _table(sections["train"], definitions)]
    return "\n".join(parts)


def _sentence(text: str) -> str:
    text = _escaped(text.strip())
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _escaped(text: str) -> str:
    """Keep what Markdown would take for a column of a table or for HTML."""
    return text.replace("|", r"\|").replace("<", "&lt;")


def _table(section: Schema, definitions: Schema) -> str:
    described = any("description" in value for value in section["properties"].values())
    rows = ["| key | values | default |", "|---|---|---|"]
    if described:
        rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, value in section["properties"].items():
        required = name in section.get("required", ())
        default = "required" if required else f"`{_shown(value.get('default'))}`"
        row = f"| `{name}` | {values(value, definitions)} | {default} |"
        meaning = _escaped(" ".join(value.get("description", "").split()))
        rows.append(f"{row} {meaning} |" if described else row)
    return "\n".join(rows) + "\n"


def _shown(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def values(value: Schema, definitions: Schema) -> str:
    """Describe the values of a key, such as "integer above 0, or `null`"."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[1]
        keys = definitions[name].get("properties", {})
        return f"mapping of {', '.join(f'`{key}`' for key in keys)}" if keys else "mapping"
    if "anyOf" in value:
        choices = sorted(value["anyOf"], key=_rank)
        if any(each.get("type") == "number" for each in choices):
            choices = [each for each in choices if not _is_whole_number_of(each, choices)]
        return " or ".join(dict.fromkeys(values(each, definitions) for each in choices))
    if "enum" in value:
        return ", ".join(f"`{_shown(each)}`" for each in value["enum"])
    if "const" in value:
        return f"`{_shown(value['const'])}`"
    kind = value.get("type", "any value")
    if kind == "null":
        return "`null`"
    if kind == "boolean":
        return "`true`, `false`"
    if kind == "array":
        return f"list of {values(value.get('items', {}), definitions)}"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"mapping to {values(inner, definitions)}" if isinstance(inner, dict) else "mapping"
    name = {"string": "text", "number": "number", "integer": "integer"}.get(kind, kind)
    return f"{name}{_range(value)}"


def _rank(value: Schema) -> int:
    """Lists come after single values, and null is last."""
    return {"null": 3, "object": 2, "array": 1}.get(value.get("type", ""), 0)


def _is_whole_number_of(value: Schema, choices: Iterable[Schema]) -> bool:
    """Whether one of ``choices`` allows every number in the range of the integers ``value``."""
    bounds = {key: bound for key, bound in value.items() if key != "type"}
    return value.get("type") == "integer" and {"type": "number", **bounds} in choices


def _range(value: Schema) -> str:
    if value.get("type") == "integer" and "exclusiveMinimum" in value:
        value = {**value, "minimum": value["exclusiveMinimum"] + 1}
        del value["exclusiveMinimum"]
    bounds = (
        ("minimum", " from"), ("exclusiveMinimum", " above"), ("maximum", " to"),
        ("exclusiveMaximum", ", below"),
    )  # fmt: skip
    found = [f"{word} {_number(value[key])}" for key, word in bounds if key in value]
    return "".join(found)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and value < 2**31 - 1 else f"{value:g}"


def api_page() -> str:
    """Return docs/api.md: the calls in ``lorakit.__all__`` with signatures and docstrings."""
    parts = ["# Python API\n", NOTE + API_INTRO]
    listed = {name for names in GROUPS.values() for name in names}
    others = tuple(name for name in lorakit.__all__ if name not in listed | {"nn"})
    for title, names in (GROUPS | ({"Others": others} if others else {})).items():
        parts.append(f"## {title}\n")
        if title == "loralib":
            parts.append(OF_LORALIB.lstrip())
        for name in names:
            parts += [f"### `lorakit.{name}`\n", *_described(name)]
    return "\n".join(parts)


def _described(name: str) -> Iterable[str]:
    value = getattr(lorakit, name)
    if name == "LoraConfig":
        yield OF_LORA_CONFIG.lstrip()
        return
    yield f"```py\n{_signature(name, value)}\n```\n"
    yield _markdown(inspect.getdoc(value) or "")


def _signature(name: str, value: Any) -> str:
    """Return the signature as it is written in the source, one argument a line if it is long."""
    function = value.__init__ if inspect.isclass(value) else value
    [node] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef)
    arguments = node.args
    if inspect.isclass(value):
        del arguments.args[0]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and function is value else ""
    pieces = _pieces(arguments)
    line = f"def {name}({', '.join(pieces)}){returns}: ..."
    if len(line) <= 100:
        return line
    return "\n".join([f"def {name}(", *(f"    {piece}," for piece in pieces), f"){returns}: ..."])


def _pieces(arguments: ast.arguments) -> list[str]:
    """Return the arguments one by one, with a star before those by name only."""
    plain = arguments.args
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults))
    pieces = [_piece(a, d) for a, d in zip(plain, [*defaults, *arguments.defaults], strict=True)]
    if arguments.vararg:
        pieces.append(f"*{_piece(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        pieces.append("*")
    pieces += [
        _piece(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return pieces + ([f"**{_piece(arguments.kwarg, None)}"] if arguments.kwarg else [])


def _piece(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    if default is None:
        return text
    return f"{text} = " + re.sub(r"'([^'\"]*)'", r'"\1"', ast.unparse(default))


def _markdown(docstring: str) -> str:
    """Turn ``code`` into `code`, and keep asterisks of formulas from being read as emphasis."""
    pieces = re.split(r"(``.+?``)", docstring, flags=re.DOTALL)
    code = (f"`{' '.join(piece[2:-2].split())}`" for piece in pieces[1::2])
    text = (piece.replace("*", r"\*") for piece in pieces[::2])
    merged = [next(text)]
    for span, following in zip(code, text, strict=True):
        merged += [span, following]
    return re.sub(r"(?<!\n)\nRaises ", "\n\nRaises ", "".join(merged)) + "\n"


PAGES = {"recipe-keys.md": recipe_page, "api.md": api_page}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
