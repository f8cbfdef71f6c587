"""``text``: plain text; the loss is on every token, and on the EOS that is put behind it."""

from __future__ import annotations

from typing import Any

from lorakit.data.examples import Segment, TextExample
from lorakit.errors import DataError
from lorakit.recipe.sections import TaskSection, Text
from lorakit.tasks.base import Row, Task


class TextConfig(TaskSection):
    """``text_column`` names the column; ``dataset_name`` and ``dataset_config_name`` are a Hub
    data set, read when ``path`` is null."""

    name: Text = "text"
    text_column: Text = "text"
    dataset_name: Text | None = None
    dataset_config_name: Text | None = None


class PlainText(Task):
    names = ("text",)
    summary = "plain text, loss on every token and the EOS"
    Config = TextConfig
    kind = "causal"

    def hub_source(self, config: Any) -> tuple[str, str | None] | None:
        return (config.dataset_name, config.dataset_config_name) if config.dataset_name else None

    def columns(self, config: Any) -> tuple[str, ...]:
        return (config.text_column,)

    def example(self, row: Row, config: Any) -> TextExample:
        value = row[config.text_column]
        if not isinstance(value, str):
            raise DataError(f"column {config.text_column!r} holds {value!r}; allowed: text")
        if not value.strip():
            raise DataError(f"column {config.text_column!r} is empty: nothing to train on")
        return TextExample((Segment(value, trained=True),))


TASK = PlainText()
