"""Rows of chats -> messages ``{"role", "content"}``, whichever names the data has for them."""

from __future__ import annotations

from typing import Any

from lorakit.errors import DataError, shown
from lorakit.tasks.base import Row

ROLES = ("system", "user", "assistant", "tool")
#: ShareGPT's words for the roles, and those of data made in its shape.
_FROM = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

Message = dict[str, str]


def read_turns(value: Any, column: str) -> list[Message]:
    """A column's list of ``{"role", "content"}`` or ``{"from", "value"}``. Raises DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(f"column {column!r} holds {shown(value)}; allowed: a list of messages")
    return [_message(turn, number, column) for number, turn in enumerate(value, 1)]


def system_turn(row: Row) -> list[Message]:
    """The text of the column ``system``, if there is one, as a first message."""
    text = optional_text(row, "system")
    return [{"role": "system", "content": text}] if text else []


def instruction_turns(row: Row) -> list[Message]:
    """Alpaca's row: the instruction, and the input behind an empty line, ask for the output."""
    instruction, given = required_text(row, "instruction"), optional_text(row, "input")
    asked = f"{instruction}\n\n{given}" if given else instruction
    return [*system_turn(row), *pair(asked, required_text(row, "output"))]


def pair(asked: str, answer: str) -> list[Message]:
    """A question and its answer."""
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


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


def _message(turn: Any, number: int, column: str) -> Message:
    where = f"column {column!r}, message {number}"
    if not isinstance(turn, dict):
        raise DataError(f'{where}: {shown(turn)}; allowed: {{"role": ..., "content": ...}}')
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise DataError(f"{where}: {key} = {shown(turn[key])}; allowed: text only")
    role, content = _role(turn, where)
    if role == "assistant" and turn.get("weight") not in (None, 1):
        raise DataError(
            f"{where}: weight = {shown(turn['weight'])}; allowed: 1, as each of the assistant's "
            "turns is trained"
        )
    if role == "assistant" and not content.strip():
        raise DataError(f"{where}: the assistant's content is empty: nothing to train on")
    return {"role": role, "content": content}


def _role(turn: dict[str, Any], where: str) -> tuple[str, str]:
    """Role and content. Rows from parquet have every key that any turn has, null in the others."""
    if turn.get("role") is None and turn.get("from") is not None:
        names, role_key, text_key = _FROM, "from", "value"
    else:
        names, role_key, text_key = {role: role for role in ROLES}, "role", "content"
    role, content = turn.get(role_key), turn.get(text_key)
    if not isinstance(role, str) or role not in names:
        raise DataError(f"{where}: {role_key} = {shown(role)}; allowed: {', '.join(names)}")
    text = _joined(content)
    if text is None:
        raise DataError(f"{where}: {text_key} = {shown(content)}; allowed: text")
    return names[role], text


def _joined(content: Any) -> str | None:
    """Text, or OpenAI's list of parts ``{"type": "text", "text": ...}`` as one; None for others."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts) if texts else None
