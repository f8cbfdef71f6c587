"""``chat``: messages through the model's chat template; the loss is on the assistant's turns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

from pydantic import model_validator

from lorakit.data.chat.template import PAYLOAD
from lorakit.data.examples import ChatExample
from lorakit.data.sources import Split
from lorakit.errors import DataError
from lorakit.recipe.sections import Text
from lorakit.tasks.base import GenerationSection, Prediction, Row, exact_matches
from lorakit.tasks.formats import FormattedTask
from lorakit.tasks.messages import Turn, left_turns, read_tools
from lorakit.tasks.turns import (
    history_turns,
    instruction_turns,
    pair,
    read_turns,
    required_text,
    unread_message_keys,
    with_system,
)

_MESSAGES = {"messages": "messages", "sharegpt": "conversations"}


class ChatConfig(GenerationSection):
    """``format`` is the rows' shape, ``auto`` from their columns: ``messages`` (``role``,
    ``content``), ``sharegpt`` (``conversations`` of ``from``, ``value``), ``alpaca``
    (``instruction``, ``input``, ``output``), ``prompt_completion``; each with the columns
    ``system`` and ``tools``, the last two also with ``history``, if there are any.
    ``messages_column`` names a column of messages instead. ``stop`` are texts before which a
    generation ends. ``dataset_name`` and ``dataset_config_name`` are a Hub data set, read when
    ``path`` is null.

    ``eval_generate`` is ``never`` here: a chat's answer is seldom one right text, so its exact
    match says little for the time that it takes.
    """

    name: Text = "chat"
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = "auto"
    messages_column: Text | None = None
    stop: list[Text] = []
    eval_generate: Literal["never", "end", "always"] = "never"
    dataset_name: Text | None = None
    dataset_config_name: Text | None = None

    @model_validator(mode="after")
    def _one_way_to_read(self) -> ChatConfig:
        if self.messages_column and self.format in ("alpaca", "prompt_completion"):
            raise ValueError(
                f"messages_column and format: {self.format} contradict each other; give one"
            )
        return self


class Chat(FormattedTask):
    """Each assistant turn is trained, those of ``history`` too, unless its ``train``, ``training``,
    ``loss`` or ``weight`` says otherwise.

    Turns after the last trained one teach nothing and are left out, so that a chat may end with
    the user's. What is generated is the last trained turn.
    """

    names = ("chat",)
    summary = "messages through the model's chat template, loss on the assistant's turns"
    Config = ChatConfig
    kind = "causal"
    formats = ("messages", "sharegpt", "alpaca", "prompt_completion")
    column_keys = "task.messages_column"

    def own_columns(self, config: Any) -> tuple[str, ...]:
        return (config.messages_column,) if config.messages_column else ()

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        read = super().read_columns(config, columns) or ()
        return (*read, "system", "tools")

    def unread_keys(self, row: Row, config: Any) -> Iterable[str]:
        if column := self._messages_column(tuple(row), config):
            return unread_message_keys(row.get(column), column)
        return ()

    def has_left_turns(self, row: Row, config: Any) -> bool:
        column = self._messages_column(tuple(row), config)
        return column is not None and bool(left_turns(row.get(column)))

    def notes(self, config: Any, split: Split) -> list[str]:
        said = super().notes(config, split)
        if "history" in (self.read_columns(config, split.columns) or ()) and (
            "history" in split.columns
        ):
            said.append(f"{split.source}: the answers in column history are trained too")
        return said

    def example(self, row: Row, config: Any) -> ChatExample:
        turns = self._turns(row, config)
        trained = [turn.trained for turn in turns]
        if not any(trained):
            if any(turn.message["role"] == "assistant" for turn in turns):
                raise DataError(
                    "no turn of the assistant is trained (by train, training, loss or weight): "
                    "nothing to train on"
                )
            raise DataError("the chat has no turn of the assistant: nothing to train on")
        last = max(index for index, flag in enumerate(trained) if flag)
        return ChatExample(
            tuple(turn.message for turn in turns[: last + 1]),
            tuple(trained[: last + 1]),
            read_tools(row.get("tools"), "tools"),
        )

    def prompt(self, row: Row, config: Any) -> ChatExample:
        example = self.example(row, config)
        before = example.messages[:-1]
        if not before:
            raise DataError("nothing stands before the assistant's only turn: nothing to answer")
        _text_of(example)
        return ChatExample(before, (False,) * len(before), example.tools)

    def stop_texts(self, config: Any) -> tuple[str, ...]:
        return tuple(config.stop)

    def main_metric(self, config: Any) -> str:
        return "exact_match" if self.generates(config) else "loss"

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """``exact_match`` with the text of the last trained turn; an evaluation gives a prediction
        that is the turn as the chat template renders it as that text."""
        return exact_matches(predictions, split, lambda row: _text_of(self.example(row, config)))

    def _messages_column(self, columns: tuple[str, ...], config: Any) -> str | None:
        """The column that holds messages; None for the formats of one question and one answer."""
        if config.messages_column:
            return str(config.messages_column)
        return _MESSAGES.get(self.format_of(columns, config).name)

    def _turns(self, row: Row, config: Any) -> list[Turn]:
        columns = tuple(row)
        if column := self._messages_column(columns, config):
            return with_system(row, read_turns(row[column], column))
        if self.format_of(columns, config).name == "alpaca":
            turns, answer = instruction_turns(row), "output"
        else:
            turns = pair(required_text(row, "prompt"), required_text(row, "completion"))
            answer = "completion"
        if not row[answer].strip():
            raise DataError(f"column {answer!r} is empty: nothing to train on")
        return with_system(row, [*history_turns(row), *turns])


def _text_of(example: ChatExample) -> str:
    """What a generated text is compared with. Raises DataError for a turn that is more than text:
    the model writes its calls and its reasoning too, as the chat template has them."""
    message = example.messages[-1]
    for key in PAYLOAD:
        if message.get(key):
            raise DataError(
                f"message {len(example.messages)}: the last trained turn has {key}, and exact "
                "match compares plain text; allowed: task.eval_generate = never, or rows without"
            )
    return str(message["content"])


TASK = Chat()
