"""Tasks of a user's own file: ``./my_task.py:MyTask`` and ``./my_task.yaml``."""

from __future__ import annotations

import inspect
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorakit.errors import DataError
from lorakit.recipe.sections import TaskSection
from lorakit.tasks.base import Task
from lorakit.tasks.own_code import guarded, is_code, load_attribute
from lorakit.tasks.own_metric import checked_scores
from lorakit.tasks.own_yaml import load_yaml_task

_ALLOWED = "a subclass of lorakit.tasks.base.Task, or an instance of one"
_GUARDED = ("load", "resolve", "labels", "columns", "example", "prompt", "chosen", "notes")


def load_task(name: str) -> Task:
    """The task that a file holds. A relative path stands from the working directory.

    Raises DataError in one line for Python that does not run or is no task, RecipeError with every
    problem of a YAML file.
    """
    if not is_code(name):
        return load_yaml_task(Path(name))
    _, file, digest = load_attribute(name)
    return _task(name, file.resolve(), digest)


@lru_cache(maxsize=32)
def _task(name: str, path: Path, digest: bytes) -> Task:
    """One object for a file as it stands, whose failures name file and line."""
    found, file, _ = load_attribute(name)
    task = _instance(name, found)
    for method in _GUARDED:
        setattr(task, method, guarded(getattr(task, method), file))
    metrics = guarded(task.metrics, file)

    def scores(predictions: Any, split: Any, config: Any) -> dict[str, float]:
        given = checked_scores(metrics(predictions, split, config), f"{name}.metrics")
        main = task.main_metric(config)
        if given and main not in {*given, "loss", "perplexity"}:
            raise DataError(
                f"{name}: main_metric is {main!r}, and metrics gives {', '.join(given)}"
            )
        return given

    task.metrics = scores  # type: ignore[method-assign]
    task.digest = digest
    return task


def _instance(name: str, found: Any) -> Task:
    """A task with what every task has. Raises DataError."""
    if isinstance(found, type) and issubclass(found, Task):
        if inspect.isabstract(found):
            missing = ", ".join(sorted(found.__abstractmethods__))
            raise DataError(f"{name}: lacks {missing}; allowed: a task that has these methods")
        try:
            found = found()
        except Exception as error:
            raise DataError(f"{name}: cannot be made without arguments: {error}") from error
    if not isinstance(found, Task):
        raise DataError(f"{name}: is of type {type(found).__name__}; allowed: {_ALLOWED}")
    section = getattr(found, "Config", None)
    if not (isinstance(section, type) and issubclass(section, TaskSection)):
        raise DataError(f"{name}: Config = {section!r}; allowed: a subclass of TaskSection")
    kind = getattr(found, "kind", None)
    if kind not in ("causal", "encoder"):
        raise DataError(f"{name}: kind = {kind!r}; allowed: 'causal', 'encoder'")
    return found
