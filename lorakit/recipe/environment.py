"""``${NAME}`` and ``${NAME:-default}`` in the texts of a recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lorakit.recipe.faults import Fault
from lorakit.recipe.scalars import read_scalar
from lorakit.recipe.yaml_source import KeyPath, Source

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
