"""Descriptions of keys, read from the docstrings under their declarations.

The sources are parsed only when the JSON schema is asked for, so that loading a recipe does not
wait for it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import BaseModel


def describe_keys(section: type[BaseModel], schema: dict[str, Any]) -> None:
    """Add the description of each key to the properties of ``schema``, the JSON schema of
    ``section``, in place; those of ``pydantic.Field`` are kept."""
    descriptions: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if issubclass(owner, BaseModel) and owner is not BaseModel:
            descriptions |= _own_descriptions(owner)
    for key, value in schema.get("properties", {}).items():
        if key in descriptions:
            value.setdefault("description", descriptions[key])


@cache
def _own_descriptions(section: type[BaseModel]) -> dict[str, str]:
    """Key -> the docstring under its declaration in the body of the class."""
    try:
        source = textwrap.dedent(inspect.getsource(section))
    except (OSError, TypeError):  # a class without a source file
        return {}
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    found = {}
    for declaration, following in pairwise(body):
        if not (
            isinstance(declaration, ast.AnnAssign) and isinstance(declaration.target, ast.Name)
        ):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            found[declaration.target.id] = " ".join(str(following.value.value).split())
    return found
