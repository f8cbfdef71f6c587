"""Row formats of texts and chats, recognized by their columns; and ``text``, the simplest task.

``text`` is plain text: the loss is on every token, and on the EOS that is appended.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

from lorakit.data.examples import Segment, TextExample
from lorakit.data.sources import Split
from lorakit.errors import DataError, shown
from lorakit.recipe.sections import TaskSection, Text
from lorakit.tasks.base import Row, Task, required_text


@dataclass(frozen=True)
class Format:
    """A value of ``task.format``: rows have the columns ``required``, and may have
    ``optional``."""

    name: str
    title: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def without(self, columns: Sequence[str]) -> Format:
        """The same format without the optional ``columns``."""
        return replace(self, optional=tuple(c for c in self.optional if c not in columns))

    def __str__(self) -> str:
        optional = f"; optional: {', '.join(self.optional)}" if self.optional else ""
        return f"{self.name} ({_columns(self.required)}{optional})"


#: Optional columns of the formats with one question and one answer.
_CONTEXT = ("system", "history", "tools")

FORMATS = {
    found.name: found
    for found in (
        Format("messages", "OpenAI messages", ("messages",), ("system", "tools")),
        Format("sharegpt", "ShareGPT", ("conversations",), ("system", "tools")),
        Format("alpaca", "Alpaca", ("instruction", "output"), ("input", *_CONTEXT)),
        Format("prompt_completion", "prompt and completion", ("prompt", "completion"), _CONTEXT),
        Format("text", "plain text", ("text",)),
    )
}


@lru_cache(maxsize=64)
def matching_formats(columns: tuple[str, ...], names: tuple[str, ...]) -> tuple[Format, ...]:
    """The formats among ``names`` whose required columns are all present."""
    found = (FORMATS[name] for name in names)
    return tuple(fmt for fmt in found if all(column in columns for column in fmt.required))


def recognize(columns: tuple[str, ...], names: tuple[str, ...]) -> Format:
    """The format among ``names`` that ``columns`` match. Raises DataError unless it is exactly
    one."""
    found = matching_formats(columns, names)
    if len(found) == 1:
        return found[0]
    listed = ", ".join(map(repr, columns))
    if found:
        raise DataError(
            f"the columns {listed} match several formats: {', '.join(map(str, found))}; "
            f"choose one with task.format: {' or '.join(fmt.name for fmt in found)}"
        )
    raise DataError(f"unknown format: the columns are {listed}")


class FormattedTask(Task):
    """A task that reads rows in one of ``formats``, or columns that its config names.

    ``config.format`` is a format's name, or ``auto`` to recognize it from the columns.
    """

    formats: ClassVar[tuple[str, ...]]
    #: The keys by which a recipe names other columns.
    column_keys: ClassVar[str]
    #: Optional columns of the formats that the task rejects unless they are empty.
    refused: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def named_columns(self, config: Any) -> tuple[str, ...]:
        """The columns that the config names; empty if it leaves them to the format."""

    def columns(self, config: Any) -> tuple[str, ...]:
        if named := self.named_columns(config):
            return named
        return () if config.format == "auto" else FORMATS[config.format].required

    def column_key(self, config: Any, column: str) -> str | None:
        if self.named_columns(config):
            return super().column_key(config, column)
        return None if config.format == "auto" else "format"

    def needed_columns(self, name: str) -> tuple[tuple[str, ...], ...]:
        return tuple(FORMATS[found].required for found in self.formats)

    def format_of(self, columns: Sequence[str], config: Any) -> Format:
        """The format of rows whose columns the config does not name. Raises DataError."""
        if config.format != "auto":
            return FORMATS[config.format]
        return recognize(tuple(columns), self.formats)

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        if named := self.named_columns(config):
            return named
        found = self.format_of(columns, config)
        return (*found.required, *found.optional)

    def check_columns(self, split: Split, config: Any) -> None:
        super().check_columns(split, config)
        if self.named_columns(config):
            return
        try:
            found = self.format_of(split.columns, config)
        except DataError as error:
            if matching_formats(tuple(split.columns), self.formats):
                raise DataError(f'task.format = "auto": {split.source}: {error}') from error
            row = dict(next(iter(split.rows)))
            allowed = ", ".join(str(FORMATS[name].without(self.refused)) for name in self.formats)
            raise DataError(
                f'task.format = "auto": {split.locate(0)}: {error}; the row is {shown(row, 200)}; '
                f"allowed: {allowed}, or other columns named by {self.column_keys}"
            ) from error
        split.require(found.required)

    def notes(self, config: Any, split: Split) -> list[str]:
        if self.named_columns(config) or config.format != "auto":
            return []
        found = self.format_of(split.columns, config).without(self.refused)
        present = [name for name in found.optional if name in split.columns]
        columns = _columns((*found.required, *present))
        return [f"{split.source}: recognized as {found.title} ({columns})"]


class TextConfig(TaskSection):
    """The keys of ``text``."""

    name: Text = "text"
    format: Literal["auto", "text"] = "auto"
    """The format of the rows."""
    text_column: Text | None = None
    """The column of the text, if it has another name."""
    long_documents: Literal["truncate", "split"] = "truncate"
    """A document of more than max_length tokens loses its end (truncate), or becomes several rows
    (split)."""
    dataset_name: Text | None = None
    """A dataset on the Hub, read if path is null."""
    dataset_config_name: Text | None = None
    """The configuration of the dataset on the Hub."""


class PlainText(FormattedTask):
    names = ("text",)
    summary = "plain text, loss on every token"
    Config = TextConfig
    kind = "causal"
    formats = ("text",)
    column_keys = "task.text_column"

    def named_columns(self, config: Any) -> tuple[str, ...]:
        return (config.text_column,) if config.text_column else ()

    def example(self, row: Row, config: Any) -> TextExample:
        column = config.text_column or "text"
        text = required_text(row, column)
        if not text.strip():
            raise DataError(f"column {column!r} is empty: nothing to train on")
        splits = config.long_documents == "split"
        return TextExample((Segment(text, trained=True),), splits=splits)


def _columns(names: Sequence[str]) -> str:
    return f"column{'s' * (len(names) > 1)} {', '.join(names)}"


TASK = PlainText()
