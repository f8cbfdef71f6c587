"""The shapes that rows of texts and chats come in, recognised by their columns.

Text with ``{column}`` in it: a row's columns by name, and nothing that runs.

``{{`` and ``}}`` are braces. What stands between braces is the whole name of a column: attributes,
indices and formats, as ``str.format`` has them, are not read.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

from lorakit.data.sources import Split
from lorakit.errors import DataError, did_you_mean, shown
from lorakit.recipe.sections import Text
from lorakit.tasks.base import Task


@dataclass(frozen=True)
class Format:
    """``name`` is what ``task.format`` names; rows have the columns ``required``, and may have
    ``optional``."""

    name: str
    title: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def without(self, columns: Sequence[str]) -> Format:
        """The same, but for the optional ``columns``."""
        return replace(self, optional=tuple(c for c in self.optional if c not in columns))

    def __str__(self) -> str:
        more = f"; may have {', '.join(self.optional)}" if self.optional else ""
        return f"{self.name} ({_named(self.required)}{more})"


#: What may stand around a question and its answer.
_AROUND = ("system", "history", "tools")

FORMATS = {
    found.name: found
    for found in (
        Format("messages", "OpenAI messages", ("messages",), ("system", "tools")),
        Format("sharegpt", "ShareGPT", ("conversations",), ("system", "tools")),
        Format("alpaca", "Alpaca", ("instruction", "output"), ("input", *_AROUND)),
        Format("prompt_completion", "prompt and completion", ("prompt", "completion"), _AROUND),
        Format("text", "plain text", ("text",)),
    )
}


@lru_cache(maxsize=64)
def fitting(columns: tuple[str, ...], names: tuple[str, ...]) -> tuple[Format, ...]:
    """Those of the formats ``names`` whose columns are all there."""
    found = (FORMATS[name] for name in names)
    return tuple(fmt for fmt in found if all(column in columns for column in fmt.required))


def recognise(columns: tuple[str, ...], names: tuple[str, ...]) -> Format:
    """The one format of ``names`` that rows of ``columns`` are in. Raises DataError if there is
    none, or more than one."""
    found = fitting(columns, names)
    if len(found) == 1:
        return found[0]
    listed = ", ".join(map(repr, columns))
    if found:
        raise DataError(
            f"the columns {listed} fit more than one format: {', '.join(map(str, found))}; "
            f"choose with task.format: {' or '.join(fmt.name for fmt in found)}"
        )
    raise DataError(f"no known format: the columns are {listed}")


class FormattedTask(Task):
    """A task that takes rows in one of ``formats``, or in columns that its config names.

    ``config.format`` is the format's name, or ``auto``: recognised from the columns.
    """

    formats: ClassVar[tuple[str, ...]]
    #: The keys by which a recipe names columns of its own.
    column_keys: ClassVar[str]
    #: Optional columns of the formats that the task refuses unless they are empty.
    refused: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def own_columns(self, config: Any) -> tuple[str, ...]:
        """The columns that the config names; empty if it leaves them to the format."""

    def hub_source(self, config: Any) -> tuple[str, str | None] | None:
        return (config.dataset_name, config.dataset_config_name) if config.dataset_name else None

    def columns(self, config: Any) -> tuple[str, ...]:
        if own := self.own_columns(config):
            return own
        return () if config.format == "auto" else FORMATS[config.format].required

    def format_of(self, columns: Sequence[str], config: Any) -> Format:
        """The format of rows whose columns the config does not name. Raises DataError."""
        if config.format != "auto":
            return FORMATS[config.format]
        return recognise(tuple(columns), self.formats)

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        if own := self.own_columns(config):
            return own
        found = self.format_of(columns, config)
        return (*found.required, *found.optional)

    def check_columns(self, split: Split, config: Any) -> None:
        super().check_columns(split, config)
        if self.own_columns(config):
            return
        try:
            found = self.format_of(split.columns, config)
        except DataError as error:
            if fitting(tuple(split.columns), self.formats):
                raise DataError(f"{split.source}: {error}") from error
            row = dict(next(iter(split.rows)))
            allowed = ", ".join(str(FORMATS[name].without(self.refused)) for name in self.formats)
            raise DataError(
                f"{split.locate(0)}: {error}; the row is {shown(row, 200)}; allowed: {allowed}, "
                f"or columns of your own by {self.column_keys}"
            ) from error
        split.require(found.required)

    def notes(self, config: Any, split: Split) -> list[str]:
        if self.own_columns(config) or config.format != "auto":
            return []
        found = self.format_of(split.columns, config).without(self.refused)
        there = [name for name in found.optional if name in split.columns]
        columns = _named((*found.required, *there))
        return [f"{split.source}: recognised as {found.title} ({columns})"]


def _named(columns: Sequence[str]) -> str:
    return f"column{'s' * (len(columns) > 1)} {', '.join(columns)}"


_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


@lru_cache(maxsize=64)
def _pieces(template: str) -> tuple[tuple[str, bool], ...]:
    """Text or column, and whether it is a column. Raises ValueError for a brace without its mate
    and for empty braces."""
    pieces = []
    for match in _PIECE.finditer(template):
        text, column = match.group(), match.group(1)
        if column is not None:
            if not column.strip():
                raise ValueError("a column's name is missing in {}; {{}} are plain braces")
            pieces.append((column, True))
        elif text in ("{", "}"):
            raise ValueError(f"a single {text!r}; {text * 2!r} is a plain brace")
        else:
            pieces.append((text[:1] if text in ("{{", "}}") else text, False))
    return tuple(pieces)


def _checked(template: str) -> str:
    _pieces(template)
    return template


#: A template as a recipe's value.
TemplateText = Annotated[Text, AfterValidator(_checked)]


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that stand in it, each once."""
    return tuple(dict.fromkeys(text for text, is_column in _pieces(template) if is_column))


def check_template(template: str, key: str, columns: Sequence[str]) -> None:
    """Raise DataError, with the nearest there is, for a name that no column has."""
    for name in template_columns(template):
        if name not in columns:
            message = did_you_mean(f"{key}: no column {name!r}", name, columns)
            if re.search(r"[.\[!:]", name):
                message += "; braces hold a column's whole name, no attribute, index or format"
            raise DataError(f"{message}; the columns are {', '.join(map(repr, columns))}")


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The text with the row's values; a number is written as Python writes it, and a missing or
    null one is empty. Raises DataError for a value that is neither text nor number."""
    return "".join(
        _column_text(text, row.get(text)) if is_column else text
        for text, is_column in _pieces(template)
    )


def _column_text(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        f"column {column!r} holds {shown(value)}; allowed in a template: text or a number"
    )
