"""``auto``: ``chat``, ``completion`` or ``text``, chosen by the columns of the rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

from lorakit.data.examples import Example
from lorakit.data.sources import Split
from lorakit.errors import DataError
from lorakit.recipe.sections import Text
from lorakit.tasks.base import GenerationSection, Prediction, Row, Task
from lorakit.tasks.chat import TASK as CHAT
from lorakit.tasks.completion import TASK as COMPLETION
from lorakit.tasks.formats import TASK as TEXT
from lorakit.tasks.formats import FormattedTask

_TASKS: dict[str, FormattedTask] = {
    "messages": CHAT,
    "sharegpt": CHAT,
    "alpaca": COMPLETION,
    "prompt_completion": COMPLETION,
    "text": TEXT,
}


class AutoConfig(GenerationSection):
    """``format`` selects one of several formats that the columns match. The other keys are passed
    to the chosen task; to set any other key of that task, name the task instead of ``auto``. A null
    ``eval_generate`` means the chosen task's default.
    """

    name: Text = "auto"
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """The format of the rows, if their columns match several."""
    stop: list[Text] = []
    """Stop sequences: generated text ends before the first of them."""
    long_documents: Literal["truncate", "split"] = "truncate"
    """A document of more than max_length tokens loses its end (truncate), or becomes several rows
    (split)."""
    eval_generate: Literal["never", "end", "always"] | None = None  # type: ignore[assignment]
    """Which evaluations generate text; null is the chosen task's default."""
    dataset_name: Text | None = None
    """A dataset on the Hub, read if path is null."""
    dataset_config_name: Text | None = None
    """The configuration of the dataset on the Hub."""


class Auto(FormattedTask):
    """Chooses ``chat`` for messages (OpenAI, ShareGPT), ``completion`` for Alpaca rows and for
    prompt and completion, ``text`` for a column ``text``. A run continues as the task that
    ``chosen`` returns, and its resolved recipe names that task."""

    names = ("auto",)
    summary = "picks chat, completion or text"
    Config = AutoConfig
    kind = "causal"
    formats = tuple(_TASKS)
    column_keys = "the keys of task.name: chat, completion or text"

    def named_columns(self, config: Any) -> tuple[str, ...]:
        return ()

    def chosen(self, config: Any, split: Split) -> tuple[Task, Any]:
        """Return the chosen task and its config. Raises DataError for a key that the task does not
        have, which would have no effect."""
        task, task_config = self._delegate(split.columns, config)
        for key in sorted(config.model_fields_set - type(task_config).model_fields.keys()):
            if getattr(config, key) != AutoConfig.model_fields[key].default:
                raise DataError(
                    f"task.{key}: the columns of {split.source} choose the task "
                    f"{task_config.name}, which has no such key; hint: remove the key, or set "
                    "task.name"
                )
        return task, task_config

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        task, task_config = self._delegate(columns, config)
        return task.read_columns(task_config, columns)

    def unused_keys(self, row: Row, config: Any) -> Iterable[str]:
        task, task_config = self._delegate(tuple(row), config)
        return task.unused_keys(row, task_config)

    def drops_messages(self, row: Row, config: Any) -> bool:
        task, task_config = self._delegate(tuple(row), config)
        return task.drops_messages(row, task_config)

    def generates(self, config: Any, final: bool = True) -> bool:
        """Whether the chosen task may generate."""
        if config.eval_generate is None:
            return final
        return super().generates(config, final)

    def example(self, row: Row, config: Any) -> Example:
        task, task_config = self._delegate(tuple(row), config)
        return task.example(row, task_config)

    def prompt(self, row: Row, config: Any) -> Example:
        task, task_config = self._delegate(tuple(row), config)
        return task.prompt(row, task_config)

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        task, task_config = self._delegate(split.columns, config)
        return task.metrics(predictions, split, task_config)

    def _delegate(self, columns: Sequence[str], config: Any) -> tuple[Task, Any]:
        task = _TASKS[self.format_of(columns, config).name]
        section = type(task).Config
        given = {
            key: value
            for key, value in config.model_dump(exclude_unset=True).items()
            if key in section.model_fields and (key, value) != ("eval_generate", None)
        }
        return task, section.model_validate({**given, "name": task.names[0]})


TASK = Auto()
