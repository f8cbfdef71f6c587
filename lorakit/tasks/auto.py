"""``auto``: ``chat``, ``completion`` or ``text``, as the columns of the rows have it."""

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
from lorakit.tasks.formats import FormattedTask
from lorakit.tasks.text import TASK as TEXT

_TASKS: dict[str, FormattedTask] = {
    "messages": CHAT,
    "sharegpt": CHAT,
    "alpaca": COMPLETION,
    "prompt_completion": COMPLETION,
    "text": TEXT,
}


class AutoConfig(GenerationSection):
    """``format`` names the rows' shape where their columns fit more than one. The other keys are
    those of the task that is chosen; columns of your own are keys of that task, to be named then.
    ``eval_generate`` null is that task's own choice.
    """

    name: Text = "auto"
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    stop: list[Text] = []
    eval_generate: Literal["never", "end", "always"] | None = None  # type: ignore[assignment]
    dataset_name: Text | None = None
    dataset_config_name: Text | None = None


class Auto(FormattedTask):
    """Rows of messages (OpenAI, ShareGPT) are a chat; Alpaca's, and prompt and completion, are
    completions; a column ``text`` alone is text. A run goes on as the task that ``chosen`` gives,
    and its recipe is written out with that task's name."""

    names = ("auto",)
    summary = "chat, completion or text, chosen by the columns of the rows"
    Config = AutoConfig
    kind = "causal"
    formats = tuple(_TASKS)
    column_keys = "the keys of task.name: chat, completion or text"

    def own_columns(self, config: Any) -> tuple[str, ...]:
        return ()

    def chosen(self, config: Any, split: Split) -> tuple[Task, Any]:
        """Raises DataError for a key that the chosen task does not have: it would do nothing."""
        task, own = self._delegate(split.columns, config)
        for key in sorted(config.model_fields_set - type(own).model_fields.keys()):
            if getattr(config, key) != AutoConfig.model_fields[key].default:
                raise DataError(
                    f"task.{key}: the rows of {split.source} choose the task {own.name}, which has "
                    "no such key; allowed: without it, or other rows"
                )
        return task, own

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        task, own = self._delegate(columns, config)
        return task.read_columns(own, columns)

    def unread_keys(self, row: Row, config: Any) -> Iterable[str]:
        task, own = self._delegate(tuple(row), config)
        return task.unread_keys(row, own)

    def has_left_turns(self, row: Row, config: Any) -> bool:
        task, own = self._delegate(tuple(row), config)
        return task.has_left_turns(row, own)

    def generates(self, config: Any, final: bool = True) -> bool:
        """Whether the task that the rows choose may."""
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
