"""``chat``: messages through the model's chat template; the loss is on the assistant's turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import model_validator

from lorakit.data.examples import ChatExample
from lorakit.data.sources import Split
from lorakit.errors import DataError
from lorakit.recipe.sections import Text
from lorakit.tasks.base import GenerationSection, Prediction, Row
from lorakit.tasks.formats import FormattedTask
from lorakit.tasks.matches import exact_matches
from lorakit.tasks.turns import (
    Message,
    instruction_turns,
    pair,
    read_turns,
    required_text,
    system_turn,
)


class ChatConfig(GenerationSection):
    """``format`` is the rows' shape, ``auto`` from their columns: ``messages`` (``role``,
    ``content``), ``sharegpt`` (``conversations`` of ``from``, ``value``; ``system``), ``alpaca``
    (``instruction``, ``input``, ``output``, ``system``), ``prompt_completion``.
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
    """Every assistant turn is trained. Turns after the last one of the assistant's teach nothing
    and are left out, so that a chat may end with the user's word. What is generated is the last
    turn of the assistant's."""

    names = ("chat",)
    summary = "messages through the model's chat template, loss on the assistant's turns"
    Config = ChatConfig
    kind = "causal"
    formats = ("messages", "sharegpt", "alpaca", "prompt_completion")
    column_keys = "task.messages_column"

    def own_columns(self, config: Any) -> tuple[str, ...]:
        return (config.messages_column,) if config.messages_column else ()

    def example(self, row: Row, config: Any) -> ChatExample:
        messages = self._messages(row, config)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            raise DataError("the chat has no turn of the assistant: nothing to train on")
        return ChatExample(tuple(messages))

    def prompt(self, row: Row, config: Any) -> ChatExample:
        before = self.example(row, config).messages[:-1]
        if not before:
            raise DataError("nothing stands before the assistant's only turn: nothing to answer")
        return ChatExample(before)

    def stop_texts(self, config: Any) -> tuple[str, ...]:
        return tuple(config.stop)

    def main_metric(self, config: Any) -> str:
        return "exact_match" if self.generates(config) else "loss"

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """``exact_match`` with the assistant's last turn."""
        return exact_matches(
            predictions, split, lambda row: self.example(row, config).messages[-1]["content"]
        )

    def _messages(self, row: Row, config: Any) -> list[Message]:
        if config.messages_column:
            return read_turns(row[config.messages_column], config.messages_column)
        shape = self.format_of(tuple(row), config).name
        if shape == "messages":
            return read_turns(row["messages"], "messages")
        if shape == "sharegpt":
            return [*system_turn(row), *read_turns(row["conversations"], "conversations")]
        if shape == "alpaca":
            return _answered(instruction_turns(row), "output")
        turns = pair(required_text(row, "prompt"), required_text(row, "completion"))
        return _answered(turns, "completion")


def _answered(messages: list[Message], column: str) -> list[Message]:
    if not messages[-1]["content"].strip():
        raise DataError(f"column {column!r} is empty: nothing to train on")
    return messages


TASK = Chat()
