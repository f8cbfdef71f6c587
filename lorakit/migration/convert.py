"""Read a file of another tool, and write the recipe that corresponds to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.errors import Problem, RecipeError, UserError, printable
from lorakit.migration.axolotl import draft_axolotl
from lorakit.migration.draft import Draft
from lorakit.migration.llama_factory import draft_llama_factory
from lorakit.recipe.export import sections_text
from lorakit.recipe.load import load_recipe_text
from lorakit.recipe.peers.recognize import tool_of
from lorakit.recipe.sections import Recipe
from lorakit.recipe.yaml_source import KeyPath, YamlFile, read_yaml

#: What YAML 1.1, which the other tools read, takes for a boolean and YAML 1.2 for text.
_YES_NO = {"yes": True, "on": True, "no": False, "off": False}
_GROUPED = re.compile(r"[0-9]{1,18}(_[0-9]{1,18})+")


@dataclass(frozen=True)
class ConvertedRecipe:
    """``text`` is the recipe as YAML; ``tool`` is the one that ``file`` is for. ``unsupported`` are
    the keys that have no counterpart, ``changed`` those whose meaning differs, and ``ignored`` the
    names of those that a recipe does not need."""

    file: str
    tool: str
    text: str
    recipe: dict[str, Any]
    unsupported: tuple[str, ...]
    changed: tuple[str, ...]
    ignored: tuple[str, ...]


def convert_recipe(file: str | Path) -> ConvertedRecipe:
    """Convert a YAML file of Axolotl or LLaMA-Factory to a valid recipe.

    Raises RecipeError for a file that cannot be read, that is of neither, or whose values no recipe
    can have, and UserError for a kind of training that lorakit lacks, such as preference tuning.
    """
    source = read_yaml(Path(file))
    tool = tool_of(source.data)
    if source.problems:
        raise RecipeError(source.problems)
    if tool is None:
        raise RecipeError([_not_recognized(source)])
    given: dict[str, Any] = _as_yaml_1_1(source.data, source, ())
    try:
        draft = (
            draft_axolotl(given) if tool == "Axolotl" else draft_llama_factory(given, Path(file))
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    sections = {name: _ordered(name, keys) for name, keys in draft.sections.items()}
    text = _comments(str(file), tool, draft) + sections_text(sections)
    _check(text, str(file))
    return ConvertedRecipe(
        str(file), tool, text, sections, tuple(draft.unsupported), tuple(draft.changed),
        tuple(draft.ignored),
    )  # fmt: skip


def _not_recognized(source: YamlFile) -> Problem:
    if source.data.keys() & Recipe.model_fields.keys():
        message = "already a recipe of lorakit"
    else:
        message = "the keys are neither Axolotl's (base_model, ...) nor LLaMA-Factory's "
        message += "(model_name_or_path, stage, ...)"
    return Problem("", message, file=source.file)


def _as_yaml_1_1(value: Any, source: YamlFile, path: KeyPath) -> Any:
    """Read ``yes``, ``off`` and ``500_000`` as the other tools do, which use YAML 1.1."""
    if isinstance(value, dict):
        return {key: _as_yaml_1_1(item, source, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_yaml_1_1(item, source, (*path, index)) for index, item in enumerate(value)]
    if not isinstance(value, str) or path in source.quoted:
        return value
    if _GROUPED.fullmatch(value):
        return int(value)
    return _YES_NO.get(value.lower(), value)


def _ordered(section: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys with the most important ones first, without keys set to null."""
    first = ("name_or_path", "method", "name", "output_dir", "path", "format", "r", "lora_alpha",
             "epochs", "max_steps", "per_device_batch_size", "gradient_accumulation_steps",
             "learning_rate", "lr_scheduler")  # fmt: skip
    known = [key for key in first if keys.get(key) is not None]
    return {key: keys[key] for key in (*known, *keys) if keys[key] is not None}


def _comments(file: str, tool: str, draft: Draft) -> str:
    lines = [f"Converted from {tool}'s {file} by lorakit convert-recipe."]
    if draft.unsupported:
        lines += ["", "No counterpart in a recipe:", *(f"  {text}" for text in draft.unsupported)]
    if draft.changed:
        lines += ["", "Another meaning or form:", *(f"  {text}" for text in draft.changed)]
    if draft.ignored:
        lines += ["", f"Not needed: {', '.join(draft.ignored)}"]
    return "".join(f"# {printable(line)}".rstrip().replace("\n", " ") + "\n" for line in lines)


def _check(text: str, file: str) -> None:
    """Raise RecipeError with the problems of the recipe that ``text`` is, except for float16, which
    is only wrong where there is no GPU."""
    try:
        load_recipe_text(text)
    except RecipeError as error:
        place = f"{file}, converted"
        problems = [
            replace(problem, line=None, file=place)
            for problem in error.problems
            if (problem.key, problem.value) != ("model.dtype", "float16")
        ]
        if problems:
            raise RecipeError(problems) from None
