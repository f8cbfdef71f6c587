"""Errors, their exit codes, and how messages are worded.

A UserError is about the user's input and exits with 2; other errors exit with 1. A message about a
recipe key starts with the key (``task.max_length = 9: ...``), so that the command line can name the
file and line that set it. It says what is allowed after ``allowed:``. A value after ``=`` is
formatted by ``shown``; a name inside a sentence is in single quotes. Parts of a message that are
read on their own are passed to the error by name: see LorakitError.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class LorakitError(Exception):
    """Base class of all errors with a message for the user: ``ABOUT: PROBLEM; allowed: ALLOWED;
    hint: HINT``.

    ``about`` is a recipe key, an option or a name. Most errors are raised with the whole message as
    their ``problem``, because nothing reads its parts.
    """

    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        about: str | None = None,
        allowed: str | None = None,
        hint: str | None = None,
    ) -> None:
        message = f"{about}: {problem}" if about else problem
        message += f"; allowed: {allowed}" if allowed else ""
        message += f"; hint: {hint}" if hint else ""
        super().__init__(message)
        self.problem, self.about, self.allowed, self.hint = problem, about, allowed, hint


class UserError(LorakitError, ValueError):
    """Invalid input; nothing has been written, except for the checkpoint that a BadRow names."""

    exit_code = 2


class ModelError(UserError):
    """A model or tokenizer is missing, gated, unreachable or of the wrong kind.

    The message starts with the name of the model.
    """


class TargetError(UserError):
    """``target_modules`` or ``layers`` do not fit the model."""


class DataError(UserError):
    """A file, split, column or row does not fit the task."""


class BadRow(DataError):
    """A row of a stream cannot be read or trained on.

    The message names the checkpoint from which the run can resume when the row is fixed.
    """


class BadPrediction(DataError):
    """The task cannot read a prediction; ``number`` counts them from 1."""

    def __init__(self, number: int, problem: str, allowed: str) -> None:
        super().__init__(problem, about=f"prediction {number}", allowed=allowed)
        self.number = number


class AdapterError(UserError):
    """An adapter directory is missing, incomplete, or belongs to a different model."""


class TrainingError(LorakitError):
    """A run failed after it started; the message names the step and the last checkpoint."""


class HubError(LorakitError):
    """The Hub cannot be reached, or an upload failed; what is on disk is unchanged."""


class WriteFailed(LorakitError):
    """A file cannot be written: the disk is full, or the directory is gone or read-only. The
    ``hint`` says what to do."""


class EvaluationError(LorakitError):
    """A metric is not finite; the message names it and the likely cause."""


class Interrupted(LorakitError):
    """A run was stopped by SIGINT, SIGTERM or SIGHUP, after saving a checkpoint.

    ``problem`` is the message without ``advice``, how to resume. ``exit_code`` is 128 plus
    ``signal_number``: 130, 143 or 129.
    """

    def __init__(
        self, problem: str, signal_number: int, advice: str = "resume with --resume auto"
    ) -> None:
        super().__init__(f"{problem}; {advice}")
        self.problem, self.advice, self.signal_number = problem, advice, signal_number
        self.exit_code = 128 + signal_number


def shown(value: object, max_characters: int = 80) -> str:
    """Format a value for a message: on one line, shortened, control characters escaped."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= max_characters else f"{text[: max_characters - 3]}..."


#: Zero-width joiners shape the letters of some scripts and emoji.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """Escape what would control a terminal or hide text, except line breaks and tabs."""
    if text.isprintable():
        return text
    return "".join(c if _is_harmless(c) else ascii(c)[1:-1] for c in text)


def check_printable(path: object, what: str = "") -> None:
    """Raise UserError if the path of an output contains a control character, such as a line break,
    which would garble the lines that name it. ``what`` is the option or argument."""
    if any(unicodedata.category(c) == "Cc" for c in str(path)):
        named = f"{what} {shown(str(path))}: " if what else ""
        raise UserError(
            f"{named}contains a control character; allowed: a name of printable characters"
        )


def _is_harmless(c: str) -> bool:
    return c.isprintable() or c in "\n\t" or c in _JOINERS or unicodedata.category(c) == "Zs"


def listed(names: Iterable[object], most: int = 5) -> str:
    """Join the first ``most`` names, followed by the number of further ones."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def decimal(value: float) -> str:
    """``value`` with four decimals, or an exponent if it is very large."""
    return f"{value:.4f}" if abs(value) < 1e7 else f"{value:.4e}"


def os_reason(error: Exception) -> str:
    """What the operating system reports, with the file, but without the error's number."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def counted(count: int, noun: str) -> str:
    """``1 row``, ``2 rows``; ``noun`` is the singular of a regular one."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """A time for people: ``3.4 s``, ``12 s``, ``2 min 05 s``, ``49 min`` or ``1 h 02 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 10:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def memory_size(count: float) -> str:
    """Bytes of memory or free space, in powers of 1024: ``512 KiB``, ``52 MiB``, ``15.0 GiB``."""
    if count < 2**30:
        return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"
    return f"{count / 2**30:,.1f} GiB"


def file_size(count: float) -> str:
    """Bytes of files, in powers of 1000 as file systems and the Hub count: ``0.3 MB``,
    ``16.1 GB``."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


#: Multiples of bytes in the names of sizes.
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip


def parse_size(text: str | int, name: str) -> int:
    """Return the bytes of ``5GB``, ``200MiB`` or a number of bytes, the value of ``name``. Raises
    UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(text).strip().upper())
    if not match or match[2] not in _UNITS or not 0 < float(match[1]) < 1e18:
        raise UserError(f"{name} = {shown(text)}: allowed: a size such as 5GB or 200MB")
    return int(float(match[1]) * _UNITS[match[2]])


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name most similar to ``name``, or None if none is similar enough.

    Case is ignored, and ``-`` equals ``_``.
    """
    folded = {_fold(candidate): candidate for candidate in known}
    found = difflib.get_close_matches(_fold(name), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


def did_you_mean(message: str, name: object, known: Iterable[str]) -> str:
    """Append the nearest known name, if there is one, to ``message``."""
    found = nearest(name, known) if isinstance(name, str) else None
    return f"{message} (did you mean {found!r}?)" if found else message


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
    """A recipe has problems; ``problems`` are all of them."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a RecipeError needs at least one problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))
