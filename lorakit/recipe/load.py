"""A recipe file -> ``Recipe``, or every one of its problems at once.

``${NAME}`` and ``${NAME:-default}`` in the texts of a recipe.

``--set section.key=value`` and ``overrides={"section.key": value}``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorakit import registry
from lorakit.errors import Problem, RecipeError, nearest
from lorakit.recipe.check import check_sections, find_task, unknown_method
from lorakit.recipe.diagnostics import (
    OVERRIDE,
    Fault,
    explain,
    unknown_key,
    unknown_sections,
)
from lorakit.recipe.sections import (
    AdapterSection,
    ModelSection,
    Recipe,
    Section,
    TaskSection,
    TrainSection,
)
from lorakit.recipe.yaml_source import KeyPath, Source, dotted, read_scalar, read_value, read_yaml

#: What every adapter and task have, and the other two sections.
_GENERAL: dict[str, type[Section]] = {
    "model": ModelSection,
    "adapter": AdapterSection,
    "task": TaskSection,
    "train": TrainSection,
}


def load_recipe(path: str | Path, overrides: Overrides | None = None) -> Recipe:
    """Read ``path``, expand ``${ENV_VAR}``, apply ``overrides``, check everything.

    ``overrides`` is a mapping ``{"train.seed": 1}`` or texts as after ``--set``:
    ``["train.seed=1"]``. Raises RecipeError with all problems.
    """
    source = read_yaml(Path(path))
    faults = expand_environment(source)
    faults += apply_overrides(source, overrides)
    sections = [_Checked(name, source.data) for name in Recipe.model_fields]
    faults += unknown_sections(source.data)
    for section in sections:
        faults += section.faults
    model, adapter, task, train = sections
    faults += check_sections(
        model.partial, adapter.partial, task.partial, train.partial, task.task_kind
    )
    problems = sorted([*source.problems, *_located(faults, source)], key=_by_line)
    problems += task.problems
    if problems:
        raise RecipeError(problems)
    return Recipe(**{section.name: section.value for section in sections})


class _Checked:
    """One section: its valid ``value`` or its ``faults``.

    ``partial`` has what is valid, and defaults for the rest; None if there is nothing to look at.
    ``task_kind`` is that of the task which the section names; ``problems`` are those of the YAML
    file that holds it.
    """

    def __init__(self, name: str, data: dict[str, Any]) -> None:
        self.name = name
        self.value: Any = None
        self.partial: Any = None
        self.faults: list[Fault] = []
        self.problems: tuple[Problem, ...] = ()
        self.task_kind: str | None = None
        given = data.get(name)
        # `adapter:` with nothing behind it is a section in which all is left at its default.
        given = {} if name in data and given is None else given
        if isinstance(given, dict):
            self._check(given)
        elif name in data:
            self.faults.append(Fault((name,), "not a section", given, True, "a mapping of keys"))
        elif not any(nearest(key, [name]) for key in data if key not in Recipe.model_fields):
            self.faults.append(Fault((name,), "the section is missing", allowed=f"{name}:"))

    def _check(self, given: dict[str, Any]) -> None:
        section = self._class(given)
        known = tuple((section or _GENERAL[self.name]).model_fields)
        unknown = [key for key in given if key not in known]
        if section is not None:  # else the keys may be those of the one meant
            self.faults += [unknown_key(self.name, key, given[key], known) for key in unknown]
        rest = {key: value for key, value in given.items() if key in known}
        wrong: set[object] = set()
        section = section or _GENERAL[self.name]
        try:
            self.value = self.partial = section.model_validate(rest)
        except ValidationError as error:
            for fault in explain(section, rest, error):
                path = (self.name, *fault.path)
                self.faults.append(Fault(path, *_after_path(fault)))
                wrong.update(fault.path[:1])
            valid = {key: value for key, value in rest.items() if key not in wrong}
            self.partial = section.model_construct(**valid)

    def _class(self, given: dict[str, Any]) -> type[Section] | None:
        """The class that checks the section; None if its method or task is not known."""
        if self.name == "adapter":
            method = given.get("method", AdapterSection.model_fields["method"].default)
            if not isinstance(method, str):
                return None
            self.faults += unknown_method(method)
            found = registry.methods().get(method)
            return found.Config if found else None
        if self.name == "task":
            name = given.get("name")
            if not isinstance(name, str) or not name:
                return None
            task, self.problems, faults = find_task(name)
            self.faults += faults
            self.task_kind = task and task.kind
            return task.Config if task else None
        return _GENERAL[self.name]


def _after_path(fault: Fault) -> tuple[str, object, bool, str | None]:
    return fault.message, fault.value, fault.has_value, fault.allowed


def _located(faults: list[Fault], source: Source) -> Iterator[Problem]:
    """The first problem of each key, and none of a line that could not be read: what follows
    would only repeat it."""
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


#: ``$${`` is a literal ``${``; a name is as in POSIX; a default ends at the first ``}``.
_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")


def escape(text: str) -> str:
    """The text which ``expand_environment`` turns into ``text``."""
    return text.replace("${", "$${")


def expand_environment(source: Source, environ: Mapping[str, str] = os.environ) -> list[Fault]:
    """Expand the references in all texts of ``source.data``, in place; keys stay as they are.

    As in a shell, ``:-`` gives its default for a variable that is unset or empty. A value without
    quotes that is one reference and nothing else is read again as a YAML scalar, so that
    ``r: ${R}`` is a number; in quotes it stays a text. Returns what could not be expanded.
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
                "not a reference to a variable",
                "${NAME}, ${NAME:-default}, or $${ for a plain ${",
            )
        elif name is not None and default is None and name not in environ:
            yield (
                f"the environment variable {name} is not set",
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


Overrides = Mapping[str, object] | Sequence[str]

_FORM = "section.key=value, as in train.seed=1"


def apply_overrides(source: Source, overrides: Overrides | None) -> list[Fault]:
    """Put the values into ``source.data``, in place; returns what could not be read or placed.

    On the command line the value is YAML; a mapping's values are taken as they are. What stands
    behind the second dot is one key of a mapping: ``adapter.rank_pattern.layers.0.q_proj=4``.
    Environment variables are not expanded here: a shell has done so already.
    """
    faults: list[Fault] = []
    for name, value in _pairs(overrides, faults):
        path: KeyPath = tuple(name.split(".", 2))
        if not all(path):
            faults.append(Fault((name,), "an empty key", value, True, _FORM, OVERRIDE))
        else:
            faults.extend(_place(source, path, value))
    return faults


def _pairs(overrides: Overrides | None, faults: list[Fault]) -> Iterator[tuple[str, Any]]:
    if overrides is None:
        return
    if isinstance(overrides, Mapping):
        for name, value in overrides.items():
            yield str(name), _plain(value)
        return
    for text in [overrides] if isinstance(overrides, str) else overrides:
        name, equals, value = text.partition("=")
        if not equals:
            faults.append(Fault((), f"{text!r} has no '='", allowed=_FORM, file=OVERRIDE))
            continue
        try:
            yield name.strip(), read_value(value, OVERRIDE)
        except RecipeError as error:
            faults.extend(
                Fault((name,), problem.message, value, True, problem.allowed, OVERRIDE)
                for problem in error.problems
            )


def _plain(value: object) -> Any:
    """What YAML would have given: lists for tuples, texts for paths."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _place(source: Source, path: KeyPath, value: Any) -> Iterator[Fault]:
    holder: Any = source.data
    for length, part in enumerate(path[:-1], 1):
        if holder.get(part) is None:
            holder[part] = {}
        holder = holder[part]
        if not isinstance(holder, dict):
            message = f"{dotted(path[:length])} holds no keys"
            yield Fault(path, message, value, True, "the value itself", OVERRIDE)
            return
    holder[path[-1]] = value
    source.overridden.add(path)
    for known in [known for known in source.lines if known[: len(path)] == path]:
        del source.lines[known]
