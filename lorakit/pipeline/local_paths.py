"""Check that the local paths in a recipe exist, for ``lorakit validate``.

No library for tensors or models is imported, and nothing is looked up on the Hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit import registry
from lorakit.data.hub import task_data_set
from lorakit.data.paths import find_files, no_split
from lorakit.errors import DataError, ModelError, UserError
from lorakit.io.atomic import creation_problem
from lorakit.models.hub import check_location, is_missing_path
from lorakit.recipe.diagnostics import Fault
from lorakit.recipe.sections import SPLIT_ALIASES, SPLIT_NAMES, Section
from lorakit.tasks.base import Task


def path_faults(
    model: Section | None, adapter: Section | None, task: Section | None, train: Section | None
) -> Iterator[Fault]:
    """Yield a fault for a base model, an adapter and data files that do not exist, as far as they
    are local, and for an output directory that cannot be created. A section is None if it cannot be
    read, and lacks the keys that are not valid."""
    if name := getattr(model, "name_or_path", None):
        yield from _model(name)
    init_from = getattr(adapter, "init_from", None)
    if init_from and is_missing_path(init_from):
        path = ("adapter", "init_from")
        yield Fault(path, "no such directory", init_from, True, "null, or an adapter")
    if task is not None and hasattr(task, "name"):
        yield from _data(task)
    output_dir = getattr(train, "output_dir", None)
    if output_dir and (problem := creation_problem(Path(output_dir))):
        yield Fault(("train", "output_dir"), problem, output_dir, True)


def _model(name: str) -> Iterator[Fault]:
    path = ("model", "name_or_path")
    try:
        check_location(name)
    except ModelError as error:
        yield Fault(path, error.problem, name, True, error.allowed)
    except OSError as error:
        yield Fault(path, f"cannot be read: {error.strerror}", name, True)


def _data(config: Any) -> Iterator[Fault]:
    try:
        task = registry.task(config.name)
    except (KeyError, UserError):  # reported already
        return
    if type(task).load is not Task.load and registry.is_user_task(config.name):
        return  # the user's code decides what task.path means
    given = getattr(config, "path", None)
    if given is None:
        try:
            task_data_set(task.hub_source(config))
        except DataError as error:
            yield _fault(error, ("task", "path"), None)
    elif isinstance(given, dict):
        for split, files in given.items():
            if split in SPLIT_NAMES:  # any other is a fault that is reported already
                yield from _split(given, split, ("task", "path", split), files)
    else:
        yield from _split(given, "train", ("task", "path"), given)


def _split(given: Any, split: str, key: tuple[str, ...], value: Any) -> Iterator[Fault]:
    try:
        files = find_files(given, split).files
        if not files and isinstance(given, str) and Path(given).is_dir():
            others = [name for name in SPLIT_ALIASES if find_files(given, name).files]
            if not others:  # to evaluate, other splits are enough
                raise no_split(given, split)
    except DataError as error:
        yield _fault(error, key, value)


def _fault(error: DataError, key: tuple[str, ...], value: Any) -> Fault:
    """The fault of a key whose value the error's problem may begin with."""
    has_value = value is None or isinstance(value, str)
    message = error.problem.removeprefix(f"{value}: ") if has_value else error.problem
    return Fault(key, message, value, has_value, error.allowed)
