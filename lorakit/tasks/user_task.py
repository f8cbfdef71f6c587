"""Tasks defined by a user's file: ``./my_task.py:MyTask`` or ``./my_task.yaml``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, get_args

from lorakit.data.examples import ClassificationExample, Example
from lorakit.errors import DataError, shown
from lorakit.recipe.sections import TaskSection
from lorakit.tasks.base import LOWER_IS_BETTER, Task
from lorakit.tasks.user_yaml import checked_scores, load_yaml_task
from lorakit.user_code import check_concrete, guarded, is_code, load_attribute

_ALLOWED = f"a subclass of {Task.__module__}.Task, or an instance of one"
#: Public methods whose errors are reported with the user's file; ``metrics`` is wrapped separately.
_GUARDED = tuple(
    name
    for name, value in vars(Task).items()
    if inspect.isfunction(value) and not name.startswith("_") and name != "metrics"
)


def load_task(spec: str) -> Task:
    """Load the task that a file defines. The path is relative to the working directory.

    Raises UserError for Python code that fails or defines no task, and RecipeError with every
    problem of a YAML file.
    """
    if not is_code(spec):
        return load_yaml_task(Path(spec))
    loaded = load_attribute(spec, Task)
    return _task(spec, loaded.file.resolve(), loaded.digest)


@lru_cache(maxsize=32)
def _task(spec: str, path: Path, digest: bytes) -> Task:
    """Build the task, once per version of a file; errors in its methods name file and line."""
    loaded = load_attribute(spec, Task)
    task = _instance(spec, loaded.value)
    checked: dict[str, Callable[..., Any]] = {
        name: guarded(getattr(task, name), loaded.file, DataError) for name in _GUARDED
    }
    for name in ("example", "prompt"):
        checked[name] = _checked_example(checked[name], _example_types(task), f"{spec}.{name}")
    checked["stop_texts"] = _checked_stop_texts(checked["stop_texts"], f"{spec}.stop_texts")
    checked["metrics"] = _checked_metrics(
        guarded(task.metrics, loaded.file, DataError), checked["main_metric"], spec
    )
    if not _is_overridden(type(task).read_columns):  # the columns that its code reads are unknown
        checked["read_columns"] = lambda config, columns: None
    for name, method in checked.items():
        setattr(task, name, method)
    task.digest = digest
    return task


def _instance(spec: str, found: Any) -> Task:
    """Return the task, instantiated if necessary. Raises UserError for anything else."""
    if isinstance(found, type) and issubclass(found, Task):
        check_concrete(spec, found)
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise DataError(f"{spec}: cannot be created without arguments: {error}") from error
    if not isinstance(found, Task):
        raise DataError(f"{spec}: is of type {type(found).__name__}; allowed: {_ALLOWED}")
    section = getattr(found, "Config", None)
    if not (isinstance(section, type) and issubclass(section, TaskSection)):
        allowed = f"a subclass of {TaskSection.__module__}.TaskSection"
        raise DataError(f"{spec}: Config = {section!r}; allowed: {allowed}")
    kind = getattr(found, "kind", None)
    if kind not in ("causal", "encoder"):
        raise DataError(f"{spec}: kind = {shown(kind)}; allowed: causal, encoder")
    return found


def _is_overridden(method: Callable[..., Any]) -> bool:
    """Whether the method is defined outside lorakit."""
    return method.__module__.partition(".")[0] != __name__.partition(".")[0]


def _example_types(task: Task) -> tuple[type, ...]:
    if task.kind == "encoder":
        return (ClassificationExample,)
    return tuple(kind for kind in get_args(Example) if kind is not ClassificationExample)


def _checked_example(
    method: Callable[..., Any], types: tuple[type, ...], where: str
) -> Callable[..., Example]:
    """Wrap ``method`` to raise DataError unless it returns one of ``types``."""

    @wraps(method)
    def checked(row: Any, config: Any) -> Example:
        made: Example = method(row, config)
        if not isinstance(made, types):
            allowed = " or ".join(kind.__name__ for kind in types)
            raise DataError(f"{where}: returned {shown(made)}; allowed: a {allowed}")
        return made

    return checked


def _checked_stop_texts(
    method: Callable[[Any], Any], where: str
) -> Callable[[Any], tuple[str, ...]]:
    """Wrap ``stop_texts`` to raise DataError for a single string, and for an empty one, which would
    end every generation immediately."""

    @wraps(method)
    def checked(config: Any) -> tuple[str, ...]:
        texts = method(config)
        listed = isinstance(texts, (tuple, list))
        if not (listed and all(isinstance(text, str) and text for text in texts)):
            allowed = "a tuple of non-empty strings"
            raise DataError(f"{where}: returned {shown(texts)}; allowed: {allowed}")
        return tuple(texts)

    return checked


def _checked_metrics(
    method: Callable[..., Any], main_metric: Callable[[Any], str], spec: str
) -> Callable[..., dict[str, float]]:
    """Wrap ``metrics`` to raise DataError for scores that are not finite or lack the main
    metric."""

    @wraps(method)
    def checked(predictions: Any, split: Any, config: Any) -> dict[str, float]:
        scores = checked_scores(method(predictions, split, config), f"{spec}.metrics")
        main = main_metric(config)
        if scores and main not in LOWER_IS_BETTER.union(scores):
            allowed = f"one of {', '.join(scores)}, which metrics returns"
            raise DataError(f"{spec}: main_metric = {shown(main)}; allowed: {allowed}")
        return scores

    return checked
