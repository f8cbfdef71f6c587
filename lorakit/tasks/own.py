"""Tasks of a user's own file: ``./my_task.py:MyTask`` and ``./my_task.yaml``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, get_args

from lorakit.data.examples import ClassificationExample, Example
from lorakit.errors import DataError, shown
from lorakit.recipe.sections import TaskSection
from lorakit.tasks.base import Task
from lorakit.tasks.own_code import guarded, is_code, load_attribute
from lorakit.tasks.own_yaml import checked_scores, load_yaml_task

_ALLOWED = "a subclass of lorakit.tasks.base.Task, or an instance of one"
#: All that a task does, in which its file may fail; its scores are looked at besides.
_GUARDED = tuple(
    name
    for name, value in vars(Task).items()
    if inspect.isfunction(value) and not name.startswith("_") and name != "metrics"
)


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
    if not _is_own(type(task).read_columns):  # what its other methods read is not known
        setattr(task, "read_columns", lambda config, columns: None)  # noqa: B010
    for method in _GUARDED:
        setattr(task, method, guarded(getattr(task, method), file))
    for method in ("example", "prompt"):
        setattr(task, method, _giving_examples(task, method, name))
    setattr(task, "stop_texts", _giving_texts(task, name))  # noqa: B010 (as those above)
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


def _is_own(method: Callable[..., Any]) -> bool:
    """Whether the method stands in a file of the user's."""
    return method.__module__.partition(".")[0] != __name__.partition(".")[0]


def _giving_examples(task: Task, method: str, name: str) -> Callable[..., Example]:
    """The method, which raises DataError where it gives no example of the task's kind."""
    kinds = (ClassificationExample,)
    if task.kind == "causal":
        kinds = tuple(kind for kind in get_args(Example) if kind is not ClassificationExample)
    make = getattr(task, method)

    @wraps(make)
    def checked(row: Any, config: Any) -> Example:
        made: Example = make(row, config)
        if not isinstance(made, kinds):
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise DataError(f"{name}.{method}: gave {shown(made)}; allowed: a {allowed}")
        return made

    return checked


def _giving_texts(task: Task, name: str) -> Callable[[Any], tuple[str, ...]]:
    """``stop_texts``, which raises DataError for one text in place of several and for an empty
    one, which stands everywhere."""
    give = task.stop_texts

    def checked(config: Any) -> tuple[str, ...]:
        texts: Any = give(config)
        listed = isinstance(texts, (tuple, list))
        if not (listed and all(isinstance(text, str) and text for text in texts)):
            raise DataError(f"{name}.stop_texts: gave {shown(texts)}; allowed: a tuple of texts")
        return tuple(texts)

    return checked


def _instance(name: str, found: Any) -> Task:
    """A task with what every task has. Raises DataError."""
    if isinstance(found, type) and issubclass(found, Task):
        if inspect.isabstract(found):
            missing = ", ".join(sorted(found.__abstractmethods__))
            raise DataError(f"{name}: lacks {missing}; allowed: a task that has these methods")
        try:
            found = found()
        except (Exception, SystemExit) as error:
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
