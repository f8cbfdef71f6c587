"""Function calling as OpenAI stores it: a message's ``tool_calls``, a row's ``tools``.

One message of a chat: what the chat template receives, and whether the turn is trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from lorakit.data.chat.template import REASONING
from lorakit.errors import DataError, shown

CALLS_ALLOWED = '[{"type": "function", "function": {"name": TEXT, "arguments": {...}}}, ...]'
#: The keys of a call and of its function; some data has the function's without ``function``.
CALL_KEYS = frozenset({"id", "type", "function", "name", "arguments"})
FUNCTION_KEYS = frozenset({"name", "arguments"})
#: Keys of a JSON schema that may hold null; in a table (parquet) null elsewhere is an absent key.
_NULL_IN_SCHEMA = frozenset({"default", "const", "example"})


def read_list(value: Any, said: str, allowed: str) -> list[Any]:
    """A list, or the JSON text of one; empty for null and blank text. Raises DataError."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    found = _parsed(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise DataError(f"{said} {shown(value)}; allowed: {allowed}, or its JSON text")
    return found


def read_tools(value: Any, column: str) -> tuple[dict[str, Any], ...] | None:
    """The functions that a chat may call, as the chat template receives them; None for none.

    Raises DataError for anything but a list of objects or the JSON text of one.
    """
    allowed = '[{"type": "function", "function": {"name": TEXT, ...}}, ...]'
    tools = read_list(value, f"column {column!r} holds", allowed)
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, dict) or not tool:
            where = f"column {column!r}, tool {number}"
            raise DataError(f"{where}: {shown(tool)}; allowed: an object, as in {allowed}")
    if not isinstance(value, str):
        tools = _without_nulls(tools, _NULL_IN_SCHEMA)
    return tuple(tools) or None


def read_calls(value: Any, where: str, columnar: bool) -> list[dict[str, Any]]:
    """A message's ``tool_calls``, with arguments that are JSON text parsed.

    ``columnar`` says that a null argument is an absent one (see ``is_columnar``). Raises DataError.
    """
    calls = read_list(value, f"{where}: tool_calls =", CALLS_ALLOWED)
    return [
        _call(call, f"{where}, tool call {number}", columnar)
        for number, call in enumerate(calls, 1)
    ]


def read_call_text(value: Any, where: str) -> list[dict[str, Any]]:
    """ShareGPT's turn ``function_call``: the JSON text of ``{"name", "arguments"}``, or of a list
    of them. Raises DataError."""
    found = _parsed(value) if isinstance(value, str) else value
    functions = found if isinstance(found, list) else [found]
    if not functions or not all(
        isinstance(f, dict) and f.keys() == FUNCTION_KEYS for f in functions
    ):
        raise DataError(
            f"{where}: value = {shown(value)}; allowed for function_call: the JSON text of "
            '{"name": TEXT, "arguments": {...}} or of a list of them'
        )
    calls = [{"type": "function", "function": function} for function in functions]
    return read_calls(calls, where, columnar=False)


def is_columnar(messages: list[Any]) -> bool:
    """Whether the messages come from a table, as parquet's do: each has the keys of all, with null
    where it has no value. There null means absent, also inside the arguments of a call."""
    rows = [message for message in messages if isinstance(message, dict)]
    keys = {frozenset(row) for row in rows}
    return len(keys) == 1 and any(value is None for row in rows for value in row.values())


def _call(call: Any, where: str, columnar: bool) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise DataError(f"{where}: {shown(call)}; allowed: an object, as in {CALLS_ALLOWED}")
    if call.get("type") not in (None, "function"):
        raise DataError(f"{where}: type = {shown(call['type'])}; allowed: function")
    read = {"name": name, "arguments": _arguments(function.get("arguments"), where, columnar)}
    if function is not call:
        read = {"function": read}
    given = {key: call[key] for key in ("id", "type") if call.get(key) is not None}
    return {**given, **read}


def _arguments(value: Any, where: str, columnar: bool) -> dict[str, Any]:
    """A mapping, which is what chat templates expect, whether the data has one or its text."""
    blank = value is None or (isinstance(value, str) and not value.strip())
    found = {} if blank else _parsed(value) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise DataError(
            f"{where}: arguments = {shown(value)}; allowed: a JSON object, or the text of one"
        )
    return _without_nulls(found) if columnar and found is value else found


def _parsed(text: str) -> Any:
    """The value that the JSON text stands for; None where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _without_nulls(value: Any, kept: frozenset[str] = frozenset()) -> Any:
    """``value`` without the keys that hold null, at any depth, except those in ``kept``."""
    if isinstance(value, list):
        return [_without_nulls(item, kept) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_nulls(item, kept)
        for key, item in value.items()
        if item is not None or key in kept
    }


Message = dict[str, Any]

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
#: ShareGPT's names for the roles, and those of data made in its shape.
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
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
#: Booleans that say whether a turn is trained; ``weight`` says it with 0 or 1.
_FLAGS = ("train", "training", "loss")
_TEXTS = frozenset({"name", "tool_call_id", *REASONING})
#: Keys whose values do not go to the chat template as they are.
_READ = frozenset({*_FLAGS, "weight", "tool_calls", "function_call", "role", "content"})
_PLAIN = {"role", "content"}


class Turn(NamedTuple):
    """A message as the chat template receives it, and whether the loss is taken on it."""

    message: Message
    trained: bool


def read_message(turn: Any, where: str, columnar: bool = False) -> Turn:
    """``{"role", "content"}`` or ``{"from", "value"}``, and the keys that stand beside them.

    A key that lorakit does not know goes to the chat template, which may read it. One that holds
    null is absent. Raises DataError that begins with ``where``.
    """
    if not isinstance(turn, dict):
        raise DataError(f'{where}: {shown(turn)}; allowed: {{"role": ..., "content": ...}}')
    if turn.get("function_call"):
        raise DataError(
            f"{where}: function_call = {shown(turn['function_call'])}; allowed: tool_calls = "
            f"{CALLS_ALLOWED}"
        )
    message = _content(turn, where, columnar)
    trained = message["role"] == "assistant"
    if turn.keys() != _PLAIN:
        message.update(_others(turn, where))
        trained = _is_trained(turn, message["role"], where)
    if trained and not _says_something(message):
        raise DataError(f"{where}: the assistant's content is empty: nothing to train on")
    return Turn(message, trained)


def _others(turn: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """What the chat template receives as it is."""
    read = _READ | {"from", "value"} if _is_sharegpt(turn) else _READ
    for key, value in turn.items():
        if key in read or value is None:
            continue
        if key in _TEXTS and not isinstance(value, str):
            raise DataError(f"{where}: {key} = {shown(value)}; allowed: text")
        yield key, value


def unread_keys(turn: Any) -> Iterator[str]:
    """The keys of a message, and of the objects in it, that reach neither ``read_message`` nor the
    chat template."""
    if not isinstance(turn, dict):
        return
    if _is_sharegpt(turn):
        yield from (key for key in ("role", "content") if holds_something(turn.get(key)))
    if isinstance(content := turn.get("content"), list):
        for part in content:
            yield from (f"content[].{key}" for key in _unknown(part, {"type", "text"}))
    if isinstance(calls := turn.get("tool_calls"), list):
        for call in calls:
            yield from (f"tool_calls[].{key}" for key in _unknown(call, CALL_KEYS))
            function = call.get("function") if isinstance(call, dict) else None
            keys = _unknown(function, FUNCTION_KEYS)
            yield from (f"tool_calls[].function.{key}" for key in keys)


def _unknown(found: Any, known: frozenset[str] | set[str]) -> Iterator[str]:
    if isinstance(found, dict):
        yield from (key for key in found if key not in known and holds_something(found[key]))


def left_turns(value: Any) -> list[dict[str, Any]]:
    """Those of a column's messages that stand behind the last trained one; empty if none is
    trained, or one of these cannot be read."""
    turns = value if isinstance(value, list) else []
    for place in range(len(turns) - 1, -1, -1):
        turn = turns[place]
        role = _role(turn) if isinstance(turn, dict) else None
        try:
            if role is None or _is_trained(turn, role, ""):
                return turns[place + 1 :] if role else []
        except DataError:
            return []
    return []


def keys_beside_text(turn: dict[str, Any]) -> Iterator[str]:
    """The keys of a message beside its role, its text and whether it is trained."""
    known = {"role", "content", "from", "value", "weight", *_FLAGS}
    return (key for key in turn if key not in known and holds_something(turn[key]))


def _role(turn: dict[str, Any]) -> str | None:
    name, names = (turn["from"], _FROM) if _is_sharegpt(turn) else (turn.get("role"), _ROLES)
    return names.get(name) if isinstance(name, str) else None


def holds_something(value: Any) -> bool:
    """False for null, blank text and an empty container: leaving those out loses nothing."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, (list, dict)) and not value)


def _is_sharegpt(turn: dict[str, Any]) -> bool:
    """Rows of a table have every key that any message has, null in the others."""
    return turn.get("role") is None and turn.get("from") is not None


def _content(turn: dict[str, Any], where: str, columnar: bool) -> Message:
    """Role, content and the calls of tools."""
    sharegpt = _is_sharegpt(turn)
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    names = _FROM if sharegpt else _ROLES
    role, content = turn.get(role_key), turn.get(text_key)
    if not isinstance(role, str) or role not in names:
        raise DataError(f"{where}: {role_key} = {shown(role)}; allowed: {', '.join(names)}")
    calls = read_calls(turn["tool_calls"], where, columnar) if turn.get("tool_calls") else []
    if sharegpt and role == "function_call":
        calls, content = [*read_call_text(content, where), *calls], None
    if calls and names[role] != "assistant":
        raise DataError(
            f"{where}: tool_calls = {shown(turn['tool_calls'])}; allowed: only in the assistant's "
            "messages"
        )
    text = _joined(content)
    if text is None and not (content is None and calls):
        raise DataError(f"{where}: {text_key} = {shown(content)}; allowed: text")
    message: Message = {"role": names[role]}
    if text is not None:  # a template would print null as a word
        message["content"] = text
    return {**message, "tool_calls": calls} if calls else message


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


def _is_trained(turn: dict[str, Any], role: str, where: str) -> bool:
    """What ``train``, ``training``, ``loss`` and ``weight`` say; without them each turn of the
    assistant is trained. Raises DataError, also for a turn of another role that they train."""
    given: dict[str, bool] = {}
    for key in (*_FLAGS, "weight"):
        if (value := turn.get(key)) is not None:
            given[key] = _flag(key, value, where)
    said = [f"{key} = {shown(turn[key])}" for key in given]
    if len(set(given.values())) > 1:
        raise DataError(f"{where}: {' and '.join(said)} contradict each other; give one")
    if role != "assistant":
        if any(given.values()):
            allowed = "0" if "weight" in given else "false"
            raise DataError(
                f"{where}: {said[0]} with role {role}: only the assistant's turns are trained; "
                f"allowed: {allowed}, or no such key"
            )
        return False
    return all(given.values())


def _flag(key: str, value: Any, where: str) -> bool:
    if key != "weight":
        if isinstance(value, bool):
            return value
        raise DataError(f"{where}: {key} = {shown(value)}; allowed: true or false")
    if isinstance(value, bool) or value not in (0, 1):
        raise DataError(f"{where}: weight = {shown(value)}; allowed: 0 or 1")
    return bool(value)


def _says_something(message: Message) -> bool:
    if "tool_calls" in message or message["content"].strip():
        return True
    return any(message.get(key, "").strip() for key in REASONING)
