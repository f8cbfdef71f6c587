"""Load a recipe: read the file, expand ``${NAME}``, apply overrides, check every section."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorakit.errors import ModelError, Problem, RecipeError, UserError, at_line, nearest
from lorakit.notes import Say, silent
from lorakit.recipe.check import check_sections, find_method, find_task
from lorakit.recipe.diagnostics import (
    Fault,
    explain,
    leading_key,
    locate,
    unknown_key,
    unknown_sections,
    with_value,
)
from lorakit.recipe.overrides import Overrides, apply_overrides, drop_replaced
from lorakit.recipe.peers.recognize import tool_of
from lorakit.recipe.sections import (
    AdapterSection,
    ModelSection,
    Recipe,
    Section,
    TaskSection,
    TrainSection,
)
from lorakit.recipe.yaml_source import (
    KeyPath,
    YamlFile,
    read_scalar,
    read_yaml,
)
from lorakit.user_code import locate_error

#: Returns further faults of the sections model, adapter, task and train. A section is None if it
#: cannot be read, and lacks the keys that are not valid.
Check = Callable[[Section | None, Section | None, Section | None, Section | None], Iterable[Fault]]

#: The class of each section; methods and tasks have subclasses.
_SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "adapter": AdapterSection,
    "task": TaskSection,
    "train": TrainSection,
}


def load_recipe(
    path: str | Path,
    overrides: Overrides | None = None,
    *,
    without: Collection[str] = (),
    say: Say = silent,
    check: Check = lambda *sections: (),
) -> Recipe:
    """Load and check a recipe file.

    ``${NAME}`` and ``${NAME:-default}`` are expanded in its strings. ``overrides`` is a mapping
    (``{"train.seed": 1}``) or a list as after ``--set`` (``["train.seed=1"]``). An override
    replaces a key of the file that excludes it: ``train.max_steps`` replaces ``epochs``, and
    ``say`` gets a line about it. Keys of the file that are in ``without`` (``adapter.r``) are left
    out. ``check`` finds further faults. Raises RecipeError with all problems at once.
    """
    return _load(path, overrides, without, say, check)[0]


def load_recipe_text(text: str, check: Check = lambda *sections: ()) -> Recipe:
    """Load and check a recipe that is not in a file yet. Raises RecipeError like ``load_recipe``,
    whose problems name a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        file.write_text(text, encoding="utf-8", newline="\n")
        return load_recipe(file, check=check)


@contextmanager
def open_recipe(
    path: str | Path, overrides: Overrides | None = None, say: Say = silent
) -> Iterator[Recipe]:
    """Load a recipe for a block whose errors name the file and line of the key that caused them.

    By convention the message of a UserError about a key starts with it
    (``task.max_length = 4096: ...``; the value is added if it is missing), and that of a ModelError
    with the name of the model.
    """
    recipe, source = _load(path, overrides, (), say)
    try:
        yield recipe
    except UserError as error:
        text = str(error)
        if isinstance(error, ModelError) and text.startswith(f"{recipe.model.name_or_path}: "):
            text = f"model.name_or_path: {text}"
        if (key := leading_key(text, recipe)) is not None:
            error.args = (f"{at_line(*locate(source, key))}: {with_value(text, key, recipe)}",)
        raise


def _load(
    path: str | Path,
    overrides: Overrides | None,
    without: Collection[str],
    say: Say,
    check: Check = lambda *sections: (),
) -> tuple[Recipe, YamlFile]:
    source = read_yaml(Path(path))
    if "recipe" in source.data and {"grid", "members"} & set(source.data):
        message = f"a sweep, not a recipe; hint: lorakit sweep {path}"
        raise RecipeError([Problem("", message, file=str(path))])
    if tool := tool_of(source.data):
        message = f"written for {tool}; hint: lorakit convert-recipe {path} --output recipe.yaml"
        raise RecipeError([Problem("", message, file=str(path))])
    for dropped in without:
        holder, _, key = dropped.partition(".")
        source.data[holder].pop(key)
    faults = expand_environment(source)
    faults += apply_overrides(source, overrides)
    notes = drop_replaced(source)
    sections = [_Checked(name, source.data) for name in Recipe.model_fields]
    faults += unknown_sections(source.data)
    for section in sections:
        faults += section.faults
    model, adapter, task, train = sections
    faults += check_sections(
        model.partial, adapter.partial, task.partial, train.partial, task.task_kind
    )
    faults += check(model.partial, adapter.partial, task.partial, train.partial)
    problems = sorted([*source.problems, *_located(faults, source)], key=_by_line)
    problems += task.problems
    if problems:
        raise RecipeError(problems)
    for note in notes:
        say(note)
    return Recipe(**{section.name: section.value for section in sections}), source


class _Checked:
    """A section's ``value``, or its ``faults`` if it is not valid.

    ``partial`` has the valid keys and defaults for the others; None if the section cannot be
    checked. ``task_kind`` is the kind of the task that the section names, ``problems`` are those
    of the task's YAML file.
    """

    def __init__(self, name: str, data: dict[str, Any]) -> None:
        self.name = name
        self.value: Any = None
        self.partial: Any = None
        self.faults: list[Fault] = []
        self.problems: tuple[Problem, ...] = ()
        self.task_kind: str | None = None
        given = data.get(name)
        # `adapter:` without a value is a section with all keys left at their defaults.
        given = {} if name in data and given is None else given
        if isinstance(given, dict):
            self._check(given)
        elif name in data:
            self.faults.append(
                Fault((name,), "expected a section", given, True, "a mapping of keys")
            )
        elif not any(nearest(key, [name]) for key in data if key not in Recipe.model_fields):
            self.faults.append(Fault((name,), "required section is missing"))

    def _check(self, given: dict[str, Any]) -> None:
        section = self._class(given)
        known = tuple((section or _SECTIONS[self.name]).model_fields)
        unknown = [key for key in given if key not in known]
        if section is not None:  # else they may be keys of the intended one
            self.faults += [unknown_key(self.name, key, given[key], known) for key in unknown]
        rest = {key: value for key, value in given.items() if key in known}
        wrong: set[object] = set()
        section = section or _SECTIONS[self.name]
        try:
            self.value = self.partial = section.model_validate(rest)
        except ValidationError as error:
            for fault in explain(section, rest, error):
                self.faults.append(replace(fault, path=(self.name, *fault.path)))
                wrong.update(fault.path[:1])
            valid = {key: value for key, value in rest.items() if key not in wrong}
            self.partial = section.model_construct(**valid)
        except Exception as error:  # of a validator in a user's file
            if (text := locate_error(error)) is None:
                raise
            self.faults.append(Fault((self.name,), text))

    def _class(self, given: dict[str, Any]) -> type[Section] | None:
        """Return the class of the section, or None if its method or task is unknown."""
        if self.name == "adapter":
            method = given.get("method", AdapterSection.model_fields["method"].default)
            if not isinstance(method, str):
                return None
            found, faults = find_method(method)
            self.faults += faults
            return found.Config if found else None
        if self.name == "task":
            name = given.get("name")
            if not isinstance(name, str) or not name:
                return None
            task, self.problems, faults = find_task(name)
            self.faults += faults
            self.task_kind = task and task.kind
            return task.Config if task else None
        return _SECTIONS[self.name]


def _located(faults: list[Fault], source: YamlFile) -> Iterator[Problem]:
    """Yield the first problem of each key, skipping lines that already have a syntax problem."""
    seen: set[object] = set()
    unread = {problem.line for problem in source.problems}
    for fault in faults:
        problem = fault.locate(source)
        repeats = fault.path != () and fault.path in seen
        if not repeats and (problem.line is None or problem.line not in unread):
            seen.add(fault.path)
            yield problem


def _by_line(problem: Problem) -> tuple[bool, int]:
    return problem.line is None, problem.line or 0


#: ``$${`` is a literal ``${``. Names are as in POSIX; a default ends at the first ``}``.
_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")


def escape(text: str) -> str:
    """Return the string that ``expand_environment`` expands to ``text``."""
    return text.replace("${", "$${")


def expand_environment(source: YamlFile, environ: Mapping[str, str] = os.environ) -> list[Fault]:
    """Expand variable references in the strings of ``source.data``, in place, but not in keys.

    As in a shell, the default after ``:-`` applies to a variable that is unset or empty. An
    unquoted value that is a single reference is parsed as a YAML scalar after expansion, so that
    ``r: ${R}`` is a number; a quoted one stays a string. Returns the faults of invalid references.
    """
    faults: list[Fault] = []

    def visit(value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: visit(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [visit(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        found = [
            Fault(path, message, value, True, allowed)
            for message, allowed in _faults(value, environ)
        ]
        faults.extend(found)
        return value if found else _expand(value, environ, path in source.quoted)

    source.data = visit(source.data, ())
    return faults


def _faults(text: str, environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for match in _REFERENCE.finditer(text):
        name, default = match.groups()
        if match.group() == "${":
            yield (
                "invalid variable reference",
                "${NAME}, ${NAME:-default}, or $${ for a literal ${",
            )
        elif name is not None and default is None and name not in environ:
            yield (
                f"environment variable {name} is not set",
                f"set {name}, or give a default: ${{{name}:-...}}",
            )


def _expand(text: str, environ: Mapping[str, str], quoted: bool) -> Any:
    def replacement(match: re.Match[str]) -> str:
        name, default = match.groups()
        if name is None:
            return "${"
        return environ.get(name, "") or (default or "")

    whole = _REFERENCE.fullmatch(text)
    expanded = _REFERENCE.sub(replacement, text)
    return read_scalar(expanded) if whole and whole.group(1) and not quoted else expanded
