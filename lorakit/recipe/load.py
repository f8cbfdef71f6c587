"""A recipe file -> ``Recipe``, or every one of its problems at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorakit import registry
from lorakit.errors import Problem, RecipeError
from lorakit.recipe.check import check_sections, find_task, unknown_method
from lorakit.recipe.environment import expand_environment
from lorakit.recipe.explain import explain
from lorakit.recipe.faults import Fault, nearest
from lorakit.recipe.overrides import Overrides, apply_overrides
from lorakit.recipe.sections import (
    AdapterSection,
    ModelSection,
    Recipe,
    Section,
    TaskSection,
    TrainSection,
)
from lorakit.recipe.unknown import unknown_key, unknown_sections
from lorakit.recipe.yaml_source import Source, read_yaml

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
    problems = sorted([*source.problems, *_located(faults, source)], key=_place)
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


def _place(problem: Problem) -> tuple[bool, int]:
    return problem.line is None, problem.line or 0
