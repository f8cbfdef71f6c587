"""Rows of chats -> turns, from whichever columns the data has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorakit.errors import DataError, shown
from lorakit.tasks.base import Row
from lorakit.tasks.messages import (
    Turn,
    is_columnar,
    keys_beside_text,
    left_turns,
    read_list,
    read_message,
    unread_keys,
)


def read_turns(value: Any, column: str) -> list[Turn]:
    """A column's list of ``{"role", "content"}`` or ``{"from", "value"}``. Raises DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(f"column {column!r} holds {shown(value)}; allowed: a list of messages")
    calls = any(isinstance(turn, dict) and turn.get("tool_calls") for turn in value)
    columnar = calls and is_columnar(value)
    return [
        read_message(turn, f"column {column!r}, message {number}", columnar)
        for number, turn in enumerate(value, 1)
    ]


def unread_message_keys(value: Any, column: str) -> Iterator[str]:
    """``COLUMN[].KEY`` for each key of the messages that ``read_turns`` does not read, and of those
    that are left out because nothing trained follows them."""
    for turn in value if isinstance(value, list) else ():
        for key in unread_keys(turn):
            yield f"{column}[].{key}"
    for turn in left_turns(value):
        for key in keys_beside_text(turn):
            yield f"{column}[].{key}"


def with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """``turns`` behind the text of the column ``system``, if the row has one. Raises DataError if
    they begin with another system message."""
    text = optional_text(row, "system")
    if not text:
        return turns
    first = turns[0].message
    if first["role"] != "system":
        return [Turn({"role": "system", "content": text}, trained=False), *turns]
    if first["content"] != text:
        raise DataError(
            f"column 'system' holds {shown(text)} and message 1 is the system message "
            f"{shown(first['content'])}; allowed: one of them, or the same text in both"
        )
    return turns


def history_turns(row: Row) -> list[Turn]:
    """Alpaca's column ``history``: the earlier turns, as pairs of a question and its answer.
    Raises DataError."""
    allowed = "[[QUESTION, ANSWER], ...]"
    turns: list[Turn] = []
    pairs = read_list(row.get("history"), "column 'history' holds", allowed)
    for number, found in enumerate(pairs, 1):
        where = f"column 'history', pair {number}"
        texts = list(found) if isinstance(found, (list, tuple)) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: {shown(found)}; allowed: two texts, as in {allowed}")
        if not texts[1].strip():
            raise DataError(f"{where}: the answer is empty: nothing to train on")
        turns += pair(*texts)
    return turns


def instruction_turns(row: Row) -> list[Turn]:
    """Alpaca's row: the instruction, and the input behind an empty line, ask for the output."""
    instruction, given = required_text(row, "instruction"), optional_text(row, "input")
    asked = f"{instruction}\n\n{given}" if given else instruction
    return pair(asked, required_text(row, "output"))


def pair(asked: str, answer: str) -> list[Turn]:
    """A question and its answer."""
    return [
        Turn({"role": "user", "content": asked}, trained=False),
        Turn({"role": "assistant", "content": answer}, trained=True),
    ]


def required_text(row: Row, column: str) -> str:
    """The column's text. Raises DataError for anything else."""
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds {shown(value)}; allowed: text")
    return value


def optional_text(row: Row, column: str) -> str:
    """The column's text; empty if the column or the value is not there, or it is blank."""
    value = row.get(column)
    if value is None:
        return ""
    return value if required_text(row, column).strip() else ""
