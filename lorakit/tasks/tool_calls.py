"""Function calling as OpenAI stores it: a message's ``tool_calls``, a row's ``tools``."""

from __future__ import annotations

import json
from typing import Any

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
