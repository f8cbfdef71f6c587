"""Find methods and tasks: every module of ``lorakit/methods`` and ``lorakit/tasks`` is imported.

A method module exports ``METHOD``, which has a ``name``, a task module ``TASK``, which has
``names``. None of them imports torch at module
level, so that checking a recipe and listing names stay fast.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from lorakit.errors import UserError
from lorakit.user_code import code_identity, is_code

METHODS = "lorakit.methods"
TASKS = "lorakit.tasks"


def _exports(package: str, attribute: str, required: str) -> list[Any]:
    """The ``attribute`` of every module that has one. Raises UserError if it lacks ``required``."""
    folder = importlib.import_module(package)
    names = sorted(info.name for info in pkgutil.iter_modules(folder.__path__))
    names = [name for name in names if not name.endswith("_layer")]  # which import torch
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    exporting = [module for module in modules if hasattr(module, attribute)]
    for module in exporting:
        if not getattr(getattr(module, attribute), required, None):
            raise UserError(f"{module.__file__}: {attribute} has no {required}")
    return [getattr(module, attribute) for module in exporting]


@cache
def methods() -> dict[str, Any]:
    """Name -> ``lorakit.methods.base.Method``, for every file of ``lorakit/methods``."""
    return {method.name: method for method in _exports(METHODS, "METHOD", "name")}


def methods_for(kind: str) -> list[str]:
    """The names of the methods of ``lorakit/methods`` that adapt modules of ``kind``."""
    return [name for name, method in methods().items() if kind in method.kinds]


#: Resolved file and class -> method, for every user's file that was named in this process, the
#: one named last at the end.
_user_methods: dict[tuple[str, str], Any] = {}


def method(name: str) -> Any:
    """The ``lorakit.methods.base.Method`` that ``adapter.method`` names; a user's file,
    ``./FILE.py:CLASS``, is run here, and its method is remembered for ``user_methods``.

    Raises KeyError for an unknown name, UserError for a file that does not define a method.
    """
    if not is_code(name):
        return methods()[name]
    found = importlib.import_module(f"{METHODS}.user_method").load_method(name)
    identity = code_identity(name)
    _user_methods.pop(identity, None)
    _user_methods[identity] = found
    return found


def user_methods() -> dict[tuple[str, str], Any]:
    """Resolved file and class -> method, for the users' files that ``method`` has run, the one
    named last at the end."""
    return dict(_user_methods)


@cache
def tasks() -> dict[str, Any]:
    """Name -> ``lorakit.tasks.base.Task``, for every file of ``lorakit/tasks``, sorted by name."""
    found = {name: task for task in _exports(TASKS, "TASK", "names") for name in task.names}
    return dict(sorted(found.items()))


def is_user_task(name: str) -> bool:
    """Whether ``task.name`` is a user's file: ``./task.py:Task`` or ``./task.yaml``."""
    return is_code(name) or name.endswith((".yaml", ".yml"))


def task(name: str) -> Any:
    """The ``lorakit.tasks.base.Task`` that ``task.name`` names; a user's file is read and run here.

    Raises KeyError for an unknown name, UserError for a file that does not define a task.
    """
    if is_user_task(name):
        return importlib.import_module(f"{TASKS}.user_task").load_task(name)
    return tasks()[name]
