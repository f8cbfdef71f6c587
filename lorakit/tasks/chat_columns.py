"""Build the chat of a row from its columns, and apply what the task says about all of a chat."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.data.chat.reasoning import without_reasoning
from lorakit.data.chat.tool_calls import read_list
from lorakit.errors import DataError, shown
from lorakit.tasks.base import Row, optional_text, required_text
from lorakit.tasks.messages import Message, has_content, read_messages


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """Prepend the text of the column ``system``, if the row has one. Raises DataError if
    ``messages`` begin with a different system message."""
    text = optional_text(row, "system")
    if not text:
        return messages
    first = messages[0].fields
    if first["role"] != "system":
        return [Message({"role": "system", "content": text}, trained=False), *messages]
    if first["content"] != text:
        raise DataError(
            f"column 'system' = {shown(text)} contradicts the system message "
            f"{shown(first['content'])}; allowed: one of them, or the same text in both"
        )
    return messages


def history_messages(row: Row) -> list[Message]:
    """Read Alpaca's column ``history``, earlier questions and answers. Raises DataError."""
    allowed = "[[QUESTION, ANSWER], ...]"
    messages: list[Message] = []
    pairs = read_list(row.get("history"), "column 'history' =", allowed)
    for number, found in enumerate(pairs, 1):
        where = f"column 'history', pair {number}"
        texts = list(found) if isinstance(found, (list, tuple)) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: {shown(found)}; allowed: two texts, as in {allowed}")
        if not texts[1].strip():
            raise DataError(f"{where}: the answer is empty: nothing to train on")
        messages += exchange(*texts)
    return messages


def instruction_messages(row: Row) -> list[Message]:
    """Read an Alpaca row: instruction and input, separated by an empty line, and the output."""
    instruction, given = required_text(row, "instruction"), optional_text(row, "input")
    question = f"{instruction}\n\n{given}" if given else instruction
    return exchange(question, required_text(row, "output"))


def prompt_messages(row: Row, train_all: bool) -> list[Message]:
    """Read the columns ``prompt`` and ``completion``, each a text or a list of messages. Those of a
    prompt are not trained, unless ``train_all``. Raises DataError."""
    prompt = _text_or_messages(row, "prompt", "user")
    completion = _text_or_messages(row, "completion", "assistant")
    if not any(message.fields["role"] == "assistant" for message in completion):
        raise DataError("column 'completion' has no assistant message: nothing to train on")
    if not train_all:
        prompt = [message._replace(trained=False) for message in prompt]
    return [*prompt, *completion]


def _text_or_messages(row: Row, column: str, role: str) -> list[Message]:
    value = row.get(column)
    if isinstance(value, str):
        return [Message({"role": role, "content": value}, role == "assistant")]
    if not isinstance(value, list) or not value:
        raise DataError(f"column {column!r} = {shown(value)}; allowed: text or a list of messages")
    return read_messages(value, column)


def exchange(question: str, answer: str) -> list[Message]:
    """A question and its answer, which is trained."""
    return [
        Message({"role": "user", "content": question}, trained=False),
        Message({"role": "assistant", "content": answer}, trained=True),
    ]


def check_all_trained(messages: Sequence[Message]) -> None:
    """Raise DataError for an assistant's message that is excluded from the loss or weighted."""
    for number, message in enumerate(messages, 1):
        if message.weight != 1 or (message.fields["role"] == "assistant" and not message.trained):
            raise DataError(
                f"message {number}: train, training, loss or weight change its part in the loss, "
                "but task.train_on = all trains the whole chat; allowed: assistant or last"
            )


def drop_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Remove the reasoning from all messages. Raises DataError if nothing is left of a trained
    one."""
    kept = [message._replace(fields=without_reasoning(message.fields)) for message in messages]
    for number, message in enumerate(kept, 1):
        if message.trained and not has_content(message.fields):
            raise DataError(
                f"message {number}: the assistant's message is only reasoning, which "
                "task.reasoning = drop removes: nothing to train on"
            )
    return kept
