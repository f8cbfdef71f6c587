"""``completion``: prompt and completion; the loss is on the completion and its EOS only."""

from __future__ import annotations

from typing import Any

from lorakit.data.examples import Segment, TextExample
from lorakit.errors import DataError
from lorakit.recipe.sections import TaskSection, Text
from lorakit.tasks.base import Row, Task


class CompletionConfig(TaskSection):
    """``prompt_column`` and ``completion_column`` name the columns; ``dataset_name`` a Hub set."""

    name: Text = "completion"
    prompt_column: Text = "prompt"
    completion_column: Text = "completion"
    dataset_name: Text | None = None
    dataset_config_name: Text | None = None


class Completion(Task):
    names = ("completion",)
    summary = "prompt -> completion, loss on the completion and its EOS"
    Config = CompletionConfig
    kind = "causal"

    def hub_source(self, config: Any) -> tuple[str, str | None] | None:
        return (config.dataset_name, config.dataset_config_name) if config.dataset_name else None

    def columns(self, config: Any) -> tuple[str, ...]:
        return (config.prompt_column, config.completion_column)

    def example(self, row: Row, config: Any) -> TextExample:
        prompt, completion = row[config.prompt_column], row[config.completion_column]
        for column, value in (
            (config.prompt_column, prompt),
            (config.completion_column, completion),
        ):
            if not isinstance(value, str):
                raise DataError(f"column {column!r} holds {value!r}; allowed: text")
        if not completion.strip():
            raise DataError(f"column {config.completion_column!r} is empty: nothing to train on")
        return TextExample((Segment(prompt, trained=False), Segment(completion, trained=True)))

    def prompt(self, row: Row, config: Any) -> TextExample:
        return TextExample((Segment(row[config.prompt_column], trained=False),), eos=False)


TASK = Completion()
