"""The error family: what is the user's to mend exits with 2, what is ours with 1."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class LorakitError(Exception):
    """Any failure lorakit explains itself; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UserError(LorakitError, ValueError):
    """The input is wrong: one clear message, exit 2, nothing written."""

    exit_code = 2


class ModelError(UserError):
    """A model or tokenizer is missing, gated, unreachable, or of the wrong kind."""


class TargetError(UserError):
    """``target_modules`` or ``layers`` do not fit the model."""


class DataError(UserError):
    """A file, split, column or row does not fit the task."""


class BadRow(DataError):
    """A row of a stream cannot be read or trained on. The message names the checkpoint from which
    the run goes on once the row is mended."""


class AdapterError(UserError):
    """An adapter directory is missing, incomplete, or belongs to another model."""


class TrainingError(LorakitError):
    """The run failed after it began: the message names the step and the last good checkpoint."""


class EvaluationError(LorakitError):
    """A metric is not a finite number: the message names it and the likely cause."""


class Interrupted(LorakitError):
    """SIGINT or SIGTERM arrived; the checkpoint is saved.

    ``exit_code`` is 128 + the signal's number: 130 or 143.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def shown(value: object, max_characters: int = 80) -> str:
    """A value as it is quoted in a message: on one line, without what steers a terminal, and not
    longer than is read."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= max_characters else f"{text[: max_characters - 3]}..."


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first ``most`` names, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most similar to ``name``, ignoring case and ``-`` against ``_``; None if none
    is similar enough."""
    folded = {_fold(candidate): candidate for candidate in known}
    found = difflib.get_close_matches(_fold(name), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


def did_you_mean(message: str, name: object, known: Iterable[str]) -> str:
    """``message``, followed by the nearest known name if there is one."""
    found = nearest(name, known) if isinstance(name, str) else None
    return f"{message}; did you mean {found!r}?" if found else message


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")


def at_line(file: str, line: int | None) -> str:
    """Name a place in a file, or the file if the line is not known."""
    return f"{file}, line {line}" if line else file


@dataclass(frozen=True)
class Problem:
    """One problem of a recipe: where it is, what was found, and what is allowed.

    ``key`` is dotted, and empty for a problem of the whole file.
    """

    key: str
    message: str
    value: object = None
    has_value: bool = False
    allowed: str | None = None
    line: int | None = None
    file: str | None = None

    def __str__(self) -> str:
        key = f"{self.key} = {shown(self.value)}" if self.has_value else self.key
        where = at_line(self.file or "recipe", self.line)
        text = ": ".join(part for part in (where, key, self.message) if part)
        return f"{text}; allowed: {self.allowed}" if self.allowed else text


class RecipeError(UserError):
    """Every problem of a recipe at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a RecipeError needs at least one problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))
