"""Read the messages of a chat from a row's columns, and determine which of them are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lorakit.data.chat.template import REASONING
from lorakit.data.chat.tool_calls import (
    CALL_KEYS,
    CALLS_ALLOWED,
    FUNCTION_KEYS,
    is_columnar,
    read_call_text,
    read_calls,
    read_list,
)
from lorakit.errors import DataError, shown
from lorakit.tasks.base import is_empty

_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
#: ShareGPT's role names, and variants of them in other datasets of its format.
_SHAREGPT_ROLES = {
    "system": "system",
    "developer": "developer",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
#: Booleans that tell whether a message is trained; a ``weight`` of 0 does the same.
_FLAGS = ("train", "training", "loss")
#: The weights that are allowed besides 0. Others are likely mistakes, or not finite in float32.
_MIN_WEIGHT, _MAX_WEIGHT = 1e-6, 1e6
_TEXT_KEYS = frozenset({"name", "tool_call_id", *REASONING})
#: Keys that are not passed to the chat template unchanged.
_CONVERTED = frozenset({*_FLAGS, "weight", "tool_calls", "function_call", "role", "content"})
_PLAIN = {"role", "content"}


class Message(NamedTuple):
    """``fields`` are passed to the chat template; ``trained`` includes the message in the loss, in
    which its tokens have the ``weight``."""

    fields: dict[str, Any]
    trained: bool
    weight: float = 1.0


def read_messages(value: Any, column: str) -> list[Message]:
    """Read a column of ``{"role", "content"}`` or ``{"from", "value"}``, or the JSON text of such a
    list. Raises DataError."""
    allowed = "a list of messages"
    found = read_list(value, f"column {column!r} =", allowed)
    if not found:
        raise DataError(f"column {column!r} = {shown(value)}; allowed: {allowed}, or its JSON text")
    has_calls = any(isinstance(given, dict) and given.get("tool_calls") for given in found)
    columnar = has_calls and is_columnar(found)
    return [
        _message(given, f"column {column!r}, message {number}", columnar)
        for number, given in enumerate(found, 1)
    ]


def dropped_messages(value: Any) -> list[dict[str, Any]]:
    """The messages of a column after the last trained one; empty if none is trained or if one of
    them cannot be read."""
    return _after_last_trained(_listed(value))


def _after_last_trained(given: list[Any]) -> list[dict[str, Any]]:
    for index in range(len(given) - 1, -1, -1):
        message = given[index]
        role = _role(message) if isinstance(message, dict) else None
        try:
            if role is None or _is_trained(message, role, ""):
                return given[index + 1 :] if role else []
        except DataError:
            return []
    return []


def unused_message_keys(value: Any, column: str) -> Iterator[str]:
    """Yield ``COLUMN[].KEY`` for each key that ``read_messages`` does not read, and for each key of
    a dropped message other than its text."""
    given = _listed(value)
    for message in given:
        for key in _unused_keys(message):
            yield f"{column}[].{key}"
    text_keys = {"role", "content", "from", "value", "weight", *_FLAGS}
    for message in _after_last_trained(given):
        for key in message:
            if key not in text_keys and not is_empty(message[key]):
                yield f"{column}[].{key}"


def _listed(value: Any) -> list[Any]:
    """The list, or that of a JSON text; empty for anything else."""
    try:
        return read_list(value, "", "")
    except DataError:
        return []


def _message(given: Any, where: str, columnar: bool) -> Message:
    """Read one message. Unknown keys are passed to the chat template, which may read them; null
    keys are dropped."""
    if not isinstance(given, dict):
        raise DataError(f'{where}: {shown(given)}; allowed: {{"role": ..., "content": ...}}')
    if given.get("function_call"):
        raise DataError(
            f"{where}: function_call = {shown(given['function_call'])}; allowed: tool_calls = "
            f"{CALLS_ALLOWED}"
        )
    fields = _role_and_content(given, where, columnar)
    trained, weight = fields["role"] == "assistant", 1.0
    if given.keys() != _PLAIN:
        fields.update(_further_fields(given, where))
        trained = _is_trained(given, fields["role"], where)
        weight = float(given.get("weight") or 1) if trained else 1.0
    if trained and not has_content(fields):
        raise DataError(f"{where}: the assistant's content is empty: nothing to train on")
    return Message(fields, trained, weight)


def _role_and_content(given: dict[str, Any], where: str, columnar: bool) -> dict[str, Any]:
    """Role, content and tool calls."""
    role_key, text_key = _keys(given)
    name, content = given.get(role_key), given.get(text_key)
    role = _role(given)
    if role is None:
        allowed = ", ".join(_role_names(given))
        raise DataError(f"{where}: {role_key} = {shown(name)}; allowed: {allowed}")
    calls = read_calls(given["tool_calls"], where, columnar) if given.get("tool_calls") else []
    if str(name).lower() == "function_call":
        calls, content = [*read_call_text(content, where), *calls], None
    if calls and role != "assistant":
        raise DataError(
            f"{where}: tool_calls = {shown(given['tool_calls'])}; allowed: only in the assistant's "
            "messages"
        )
    text = _joined_parts(content)
    if text is None and not (content is None and calls):
        raise DataError(f"{where}: {text_key} = {shown(content)}; allowed: text")
    fields: dict[str, Any] = {"role": role}
    if text is not None:  # a template would print null as a word
        fields["content"] = text
    return {**fields, "tool_calls": calls} if calls else fields


def _joined_parts(content: Any) -> str | None:
    """Text, or OpenAI's list of parts ``{"type": "text", "text": ...}`` joined; None for anything
    else."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts) if texts else None


def _further_fields(given: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """The fields that are passed to the chat template unchanged."""
    converted = _CONVERTED.union(_keys(given))
    for key, value in given.items():
        if key in converted or value is None:
            continue
        if key in _TEXT_KEYS and not isinstance(value, str):
            raise DataError(f"{where}: {key} = {shown(value)}; allowed: text")
        yield key, value


def _is_trained(given: dict[str, Any], role: str, where: str) -> bool:
    """Evaluate ``train``, ``training``, ``loss`` and ``weight``; by default the assistant's
    messages are trained. Raises DataError if they contradict each other or select another role."""
    flags: dict[str, bool] = {}
    for key in (*_FLAGS, "weight"):
        if (value := given.get(key)) is not None:
            flags[key] = _flag(key, value, where)
    texts = [f"{key} = {shown(given[key])}" for key in flags]
    if len(set(flags.values())) > 1:
        raise DataError(f"{where}: {' and '.join(texts)} contradict each other; set only one")
    if role != "assistant":
        if any(flags.values()):
            allowed = "0" if "weight" in flags else "false"
            raise DataError(
                f"{where}: {texts[0]} with role {role}: only the assistant's messages are trained; "
                f"allowed: {allowed}"
            )
        return False
    return all(flags.values())


def _flag(key: str, value: Any, where: str) -> bool:
    if key != "weight":
        if isinstance(value, bool):
            return value
        raise DataError(f"{where}: {key} = {shown(value)}; allowed: true or false")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value == 0 or _MIN_WEIGHT <= value <= _MAX_WEIGHT):
        allowed = f"0, or a number from {_MIN_WEIGHT:g} to {_MAX_WEIGHT:,.0f}"
        raise DataError(f"{where}: weight = {shown(value)}; allowed: {allowed}")
    return bool(value)


def has_content(fields: dict[str, Any]) -> bool:
    """Whether a message has text, tool calls or reasoning."""
    if "tool_calls" in fields or fields["content"].strip():
        return True
    return any(fields.get(key, "").strip() for key in REASONING)


def _role(given: dict[str, Any]) -> str | None:
    """The role, of which the data may write the name in upper case; None if it is unknown."""
    name = given.get(_keys(given)[0])
    return _role_names(given).get(name.lower()) if isinstance(name, str) else None


def _role_names(given: dict[str, Any]) -> dict[str, str]:
    return _ROLES if _keys(given) == ("role", "content") else _SHAREGPT_ROLES


def _keys(given: dict[str, Any]) -> tuple[str, str]:
    """The keys of role and text: ``role`` and ``content``, ShareGPT's ``from`` and ``value``, or a
    mixture. In a table, messages may have the keys of both formats, with null in those of one."""
    role_key = "from" if given.get("role") is None and given.get("from") is not None else "role"
    first, second = ("value", "content") if role_key == "from" else ("content", "value")
    has_second_only = given.get(first) is None and given.get(second) is not None
    return role_key, second if has_second_only else first


def _unused_keys(given: Any) -> Iterator[str]:
    if not isinstance(given, dict):
        return
    if "value" in (keys := _keys(given)):
        yield from (k for k in {"role", "content"}.difference(keys) if not is_empty(given.get(k)))
    if isinstance(content := given.get("content"), list):
        for part in content:
            yield from (f"content[].{key}" for key in _unknown_keys(part, {"type", "text"}))
    if isinstance(calls := given.get("tool_calls"), list):
        for call in calls:
            yield from (f"tool_calls[].{key}" for key in _unknown_keys(call, CALL_KEYS))
            function = call.get("function") if isinstance(call, dict) else None
            for key in _unknown_keys(function, FUNCTION_KEYS):
                yield f"tool_calls[].function.{key}"


def _unknown_keys(found: Any, known: frozenset[str] | set[str]) -> Iterator[str]:
    if isinstance(found, dict):
        yield from (key for key in found if key not in known and not is_empty(found[key]))
