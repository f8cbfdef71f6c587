"""A fault of a recipe before it is known where in which file its key stands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from lorakit.errors import Problem
from lorakit.recipe.yaml_source import KeyPath, Source, dotted

#: In place of the file's name, for what was given on the command line or as ``overrides``.
OVERRIDE = "--set"


@dataclass(frozen=True)
class Fault:
    """What is wrong with the value at ``path``; ``file`` if it is not known from the path."""

    path: KeyPath
    message: str
    value: object = None
    has_value: bool = False
    allowed: str | None = None
    file: str | None = None

    def locate(self, source: Source) -> Problem:
        """The problem with file and line: those of the nearest key that stands in the file."""
        file, line = (self.file, None) if self.file else _where(source, self.path)
        return Problem(
            dotted(self.path), self.message, self.value, self.has_value, self.allowed, line, file
        )


def _where(source: Source, path: KeyPath) -> tuple[str, int | None]:
    for length in range(len(path), -1, -1):
        if path[:length] in source.overridden:
            return OVERRIDE, None
    if path not in source.lines and any(key[: len(path)] == path for key in source.overridden):
        return OVERRIDE, None
    for length in range(len(path), 0, -1):
        if path[:length] in source.lines:
            return source.file, source.lines[path[:length]]
    return source.file, None


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that ``name`` was probably meant to be."""
    folded = {_fold(candidate): candidate for candidate in known}
    found = difflib.get_close_matches(_fold(name), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


def did_you_mean(message: str, name: object, known: Iterable[str]) -> str:
    """``message`` with the nearest known name, if one is near."""
    found = nearest(name, known) if isinstance(name, str) else None
    return f"{message}; did you mean {found!r}?" if found else message


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")
