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
    stop: list[Text] = []
    eval_generate: Literal["never", "end", "always"] | None = None  # type: ignore[assignment]
    dataset_name: Text | None = None
    dataset_config_name: Text | None = None


class Auto(FormattedTask):
    """Chooses ``chat`` for messages (OpenAI, ShareGPT), ``completion`` for Alpaca rows and for
    prompt and completion, ``text`` for a column ``text``. A run continues as the task that
    ``chosen`` returns, and its resolved recipe names that task."""

    names = ("auto",)
    summary = "chat, completion or text, depending on the columns"
    Config = AutoConfig
    kind = "causal"
    formats = tuple(_TASKS)
    column_keys = "the keys of task.name: chat, completion or text"

    def named_columns(self, config: Any) -> tuple[str, ...]:
        return ()

    def chosen(self, config: Any, split: Split) -> tuple[Task, Any]:
        """Return the chosen task and its config. Raises DataError for a key that the task does not
        have, which would have no effect."""
        task, own = self._delegate(split.columns, config)
        for key in sorted(config.model_fields_set - type(own).model_fields.keys()):
            if getattr(config, key) != AutoConfig.model_fields[key].default:
                raise DataError(
                    f"task.{key}: the columns of {split.source} choose the task {own.name}, which "
                    "has no such key; allowed: no such key, or rows of another task"
                )
        return task, own

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        task, own = self._delegate(columns, config)
        return task.read_columns(own, columns)

    def unused_keys(self, row: Row, config: Any) -> Iterable[str]:
        task, own = self._delegate(tuple(row), config)
        return task.unused_keys(row, own)

    def drops_messages(self, row: Row, config: Any) -> bool:
        task, own = self._delegate(tuple(row), config)
        return task.drops_messages(row, own)

    def generates(self, config: Any, final: bool = True) -> bool:
        """Whether the chosen task may generate."""
        if config.eval_generate is None:
            return final
        return super().generates(config, final)

    def example(self, row: Row, config: Any) -> Example:
        task, own = self._delegate(tuple(row), config)
        return task.example(row, own)

    def prompt(self, row: Row, config: Any) -> Example:
        task, own = self._delegate(tuple(row), config)
        return task.prompt(row, own)

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        task, own = self._delegate(split.columns, config)
        return task.metrics(predictions, split, own)

    def _delegate(self, columns: Sequence[str], config: Any) -> tuple[Task, Any]:
        task = _TASKS[self.format_of(columns, config).name]
        own = type(task).Config
        given = {
            key: value
            for key, value in config.model_dump(exclude_unset=True).items()
            if key in own.model_fields and (key, value) != ("eval_generate", None)
        }
        return task, own.model_validate({**given, "name": task.names[0]})


TASK = Auto()
