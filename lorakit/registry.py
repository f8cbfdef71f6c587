"""The folder is the registry: what stands in ``methods/`` and ``tasks/`` is found by looking.

A method file exports ``METHOD``, a task file ``TASK``. None of them imports torch at the top, so
that a recipe is checked, and the names are listed, without loading it.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

METHODS = "lorakit.methods"
TASKS = "lorakit.tasks"


def _exports(package: str, attribute: str) -> list[Any]:
    folder = importlib.import_module(package)
    names = sorted(info.name for info in pkgutil.iter_modules(folder.__path__))
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    return [getattr(module, attribute) for module in modules if hasattr(module, attribute)]


@cache
def methods() -> dict[str, Any]:
    """Name -> ``lorakit.methods.base.Method``, for every file of ``lorakit/methods``."""
    return {method.name: method for method in _exports(METHODS, "METHOD")}


@cache
def tasks() -> dict[str, Any]:
    """Name -> ``lorakit.tasks.base.Task``, for every file of ``lorakit/tasks``."""
    return {name: task for task in _exports(TASKS, "TASK") for name in task.names}


def is_own_task(name: str) -> bool:
    """Whether ``task.name`` is a file of the user's: ``./task.py:Task`` or ``./task.yaml``."""
    return name.endswith((".py", ".yaml", ".yml")) or ".py:" in name


def task(name: str) -> Any:
    """The ``lorakit.tasks.base.Task`` of ``task.name``, which may be a file of the user's: only
    here is such a file read or run. Raises KeyError for an unknown name, UserError for a file that
    holds no task."""
    if is_own_task(name):
        return importlib.import_module(f"{TASKS}.own").load_task(name)
    return tasks()[name]
