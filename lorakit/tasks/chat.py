"""``chat``: messages rendered by the model's chat template, loss on the assistant's messages."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import model_validator

from lorakit.data.chat.template import PAYLOAD
from lorakit.data.chat.tool_calls import read_tools
from lorakit.data.examples import ChatExample
from lorakit.data.sources import Split
from lorakit.errors import DataError, shown
from lorakit.recipe.sections import Text
from lorakit.tasks.base import (
    GenerationSection,
    Prediction,
    Row,
    exact_match,
    exclusive,
    paired,
)
from lorakit.tasks.chat_columns import (
    check_all_trained,
    drop_reasoning,
    history_messages,
    instruction_messages,
    prompt_messages,
    with_system,
)
from lorakit.tasks.formats import FormattedTask
from lorakit.tasks.messages import Message, dropped_messages, read_messages, unused_message_keys

_MESSAGES = {"messages": "messages", "sharegpt": "conversations"}


class ChatConfig(GenerationSection):
    """The keys of ``chat``. All formats may have the columns ``system`` and ``tools``, alpaca and
    prompt_completion also ``history``. ``prompt`` and ``completion`` may be lists of messages.

    ``eval_generate`` is ``never`` by default: a chat rarely has a single correct answer, so
    generating for the sake of exact match is rarely worth the time.
    """

    name: Text = "chat"
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = "auto"
    """The format of the rows; auto recognizes it by the columns: messages (role, content), sharegpt
    (conversations of from, value), alpaca (instruction, input, output) or prompt_completion."""
    messages_column: Text | None = None
    """The column of the messages, if it has another name."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """The messages that are trained: every one of the assistant, the last one, or all tokens of the
    chat."""
    reasoning: Literal["train", "mask", "drop"] = "train"
    """Reasoning is trained as the chat template renders it (train), left out of the loss (mask), or
    removed from all messages (drop)."""
    stop: list[Text] = []
    """Stop sequences: generated text ends before the first of them."""
    eval_generate: Literal["never", "end", "always"] = "never"
    """Which evaluations generate and score text: never, end or always."""
    dataset_name: Text | None = None
    """A dataset on the Hub, read if path is null."""
    dataset_config_name: Text | None = None
    """The configuration of the dataset on the Hub."""

    @model_validator(mode="after")
    def _one_source(self) -> ChatConfig:
        if self.messages_column and self.format in ("alpaca", "prompt_completion"):
            raise exclusive("messages_column", f"format: {self.format}")
        return self


class Chat(FormattedTask):
    """By default every assistant message is trained, including those of ``history``, unless its
    ``train``, ``training``, ``loss`` or ``weight`` says otherwise.

    Messages after the last trained one are dropped, so a chat may end with the user's, unless all
    tokens are trained. Generation is evaluated on the last trained message of the assistant.
    """

    names = ("chat",)
    summary = "chats, with the loss on the answers"
    Config = ChatConfig
    kind = "causal"
    formats = ("messages", "sharegpt", "alpaca", "prompt_completion")
    column_keys = "task.messages_column"

    def named_columns(self, config: Any) -> tuple[str, ...]:
        return (config.messages_column,) if config.messages_column else ()

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        read = super().read_columns(config, columns) or ()
        return (*read, "system", "tools")

    def unused_keys(self, row: Row, config: Any) -> Iterable[str]:
        return (
            key
            for column in self._message_columns(row, config)
            for key in unused_message_keys(row.get(column), column)
        )

    def drops_messages(self, row: Row, config: Any) -> bool:
        columns = self._message_columns(row, config)
        if config.train_on == "all" or columns in ((), ("prompt",)):
            return False
        return bool(dropped_messages(row.get(columns[-1])))

    def notes(self, config: Any, split: Split) -> list[str]:
        notes = super().notes(config, split)
        read = self.read_columns(config, split.columns) or ()
        if config.train_on == "assistant" and {"history"} <= {*read} & {*split.columns}:
            notes.append(f"{split.source}: answers in the column history are trained too")
        return notes

    def example(self, row: Row, config: Any) -> ChatExample:
        messages, tools = self._messages(row, config), read_tools(row.get("tools"), "tools")
        if config.train_on == "all":
            check_all_trained(messages)
            return ChatExample(
                _fields(messages),
                tools=tools,
                train_all=True,
                mask_reasoning=config.reasoning == "mask",
            )
        return self._assistant_example(messages, tools, config)

    def _assistant_example(
        self, messages: list[Message], tools: tuple[Mapping[str, Any], ...] | None, config: Any
    ) -> ChatExample:
        """The messages up to the last trained one, without the rest."""
        trained = [message.trained for message in messages]
        if not any(trained):
            if any(message.fields["role"] == "assistant" for message in messages):
                raise DataError(
                    "train, training, loss or weight exclude every assistant message: nothing to "
                    "train on"
                )
            raise DataError("the chat has no assistant message: nothing to train on")
        last = max(index for index, flag in enumerate(trained) if flag)
        if config.train_on == "last":
            trained = [index == last for index in range(len(messages))]
        kept = messages[: last + 1]
        weights = tuple(message.weight for message in kept)
        return ChatExample(
            _fields(kept),
            tuple(trained[: last + 1]),
            tools,
            weights=weights if set(weights) != {1.0} else None,
            mask_reasoning=config.reasoning == "mask",
        )

    def _answered(self, row: Row, config: Any) -> ChatExample:
        """The chat up to the message that generation is evaluated on."""
        tools = read_tools(row.get("tools"), "tools")
        return self._assistant_example(self._messages(row, config), tools, config)

    def prompt(self, row: Row, config: Any) -> ChatExample:
        example = self._answered(row, config)
        before = example.messages[:-1]
        if not before:
            raise DataError("the only assistant message comes first: nothing to answer")
        _text_of(example)
        return ChatExample(before, (False,) * len(before), example.tools)

    def stop_texts(self, config: Any) -> tuple[str, ...]:
        return tuple(config.stop)

    def main_metric(self, config: Any) -> str:
        return "exact_match" if self.generates(config) else "loss"

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """``exact_match`` with the text of the last trained message.

        The chat template may render that text differently; an evaluation replaces a prediction that
        equals the rendered text by the message's text before calling this method.
        """
        pairs = paired(predictions, split, lambda row: _text_of(self._answered(row, config)))
        return {"exact_match": exact_match(*pairs)}

    def _messages_column(self, columns: tuple[str, ...], config: Any) -> str | None:
        """The column of messages; None for the formats with one question and one answer."""
        if config.messages_column:
            return str(config.messages_column)
        return _MESSAGES.get(self.format_of(columns, config).name)

    def _message_columns(self, row: Row, config: Any) -> tuple[str, ...]:
        """The columns that hold lists of messages."""
        if column := self._messages_column(tuple(row), config):
            return (column,)
        pair = ("prompt", "completion")
        return tuple(column for column in pair if isinstance(row.get(column), list))

    def _messages(self, row: Row, config: Any) -> list[Message]:
        messages = self._read_messages(row, config)
        return drop_reasoning(messages) if config.reasoning == "drop" else messages

    def _read_messages(self, row: Row, config: Any) -> list[Message]:
        columns = tuple(row)
        if column := self._messages_column(columns, config):
            return with_system(row, read_messages(row[column], column))
        if self.format_of(columns, config).name == "alpaca":
            messages, answer = instruction_messages(row), "output"
        else:
            messages, answer = prompt_messages(row, config.train_on == "all"), "completion"
            if isinstance(row["prompt"], list) and history_messages(row):
                raise DataError(
                    f"column 'history' = {shown(row['history'])}; allowed: empty next to a prompt "
                    "that is a list of messages"
                )
        if isinstance(row[answer], str) and not row[answer].strip():
            raise DataError(f"column {answer!r} is empty: nothing to train on")
        return with_system(row, [*history_messages(row), *messages])


def _fields(messages: Sequence[Message]) -> tuple[Mapping[str, Any], ...]:
    return tuple(message.fields for message in messages)


def _text_of(example: ChatExample) -> str:
    """The reference for a generated text. Raises DataError for a message with tool calls or
    reasoning, which the model also generates, as the chat template renders them."""
    message = example.messages[-1]
    for key in PAYLOAD:
        if message.get(key):
            raise DataError(
                f"message {len(example.messages)}: the last trained message has {key}, but exact "
                "match compares plain text; allowed: task.eval_generate = never, or rows without it"
            )
    return str(message["content"])


TASK = Chat()
