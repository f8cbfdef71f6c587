"""``chat``: messages through the model's chat template; the loss is on the assistant's turns."""

from __future__ import annotations

from typing import Any

from lorakit.data.examples import ChatExample
from lorakit.errors import DataError
from lorakit.recipe.sections import TaskSection, Text
from lorakit.tasks.base import Row, Task

ROLES = ("system", "user", "assistant", "tool")


class ChatConfig(TaskSection):
    """``messages_column`` holds a list of ``{"role", "content"}``; ``dataset_name`` and
    ``dataset_config_name`` are a Hub data set, read when ``path`` is null."""

    name: Text = "chat"
    messages_column: Text = "messages"
    dataset_name: Text | None = None
    dataset_config_name: Text | None = None


class Chat(Task):
    """Every assistant turn is trained. Turns after the last one of the assistant's teach nothing
    and are left out, so that a chat may end with the user's word."""

    names = ("chat",)
    summary = "messages through the model's chat template, loss on the assistant's turns"
    Config = ChatConfig
    kind = "causal"

    def hub_source(self, config: Any) -> tuple[str, str | None] | None:
        return (config.dataset_name, config.dataset_config_name) if config.dataset_name else None

    def columns(self, config: Any) -> tuple[str, ...]:
        return (config.messages_column,)

    def example(self, row: Row, config: Any) -> ChatExample:
        column, value = config.messages_column, row[config.messages_column]
        if not isinstance(value, list) or not value:
            raise DataError(f"column {column!r} holds {value!r}; allowed: a list of messages")
        messages = [_message(message, number, column) for number, message in enumerate(value, 1)]
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            raise DataError(f"column {column!r} has no turn of the assistant: nothing to train on")
        return ChatExample(tuple(messages))


def _message(message: Any, number: int, column: str) -> dict[str, str]:
    where = f"column {column!r}, message {number}"
    if not isinstance(message, dict):
        raise DataError(f'{where}: {message!r}; allowed: {{"role": ..., "content": ...}}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: role = {role!r}; allowed: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where}: content = {content!r}; allowed: text")
    if role == "assistant" and not content.strip():
        raise DataError(f"{where}: the assistant's content is empty: nothing to train on")
    return {"role": role, "content": content}


TASK = Chat()
