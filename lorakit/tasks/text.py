"""``text``: plain text; the loss is on every token, and on the EOS that is put behind it."""

from __future__ import annotations

from typing import Any, Literal

from lorakit.data.examples import Segment, TextExample
from lorakit.errors import DataError
from lorakit.recipe.sections import TaskSection, Text
from lorakit.tasks.base import Row
from lorakit.tasks.formats import FormattedTask
from lorakit.tasks.turns import required_text


class TextConfig(TaskSection):
    """``text_column`` names the column, by default ``text``; ``dataset_name`` and
    ``dataset_config_name`` are a Hub data set, read when ``path`` is null."""

    name: Text = "text"
    format: Literal["auto", "text"] = "auto"
    text_column: Text | None = None
    dataset_name: Text | None = None
    dataset_config_name: Text | None = None


class PlainText(FormattedTask):
    names = ("text",)
    summary = "plain text, loss on every token and the EOS"
    Config = TextConfig
    kind = "causal"
    formats = ("text",)
    column_keys = "task.text_column"

    def own_columns(self, config: Any) -> tuple[str, ...]:
        return (config.text_column,) if config.text_column else ()

    def example(self, row: Row, config: Any) -> TextExample:
        column = config.text_column or "text"
        value = required_text(row, column)
        if not value.strip():
            raise DataError(f"column {column!r} is empty: nothing to train on")
        return TextExample((Segment(value, trained=True),))


TASK = PlainText()
