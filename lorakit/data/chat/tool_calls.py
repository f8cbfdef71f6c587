"""Tool calls in OpenAI's format: a row's ``tools``, and a message's ``tool_calls``.

The data may have arguments as a mapping or as its JSON text; both are read as mappings, and
rendered in the form that the chat template expects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from lorakit.errors import DataError, shown

Message = Mapping[str, Any]
_Rendered = TypeVar("_Rendered")

CALLS_ALLOWED = '[{"type": "function", "function": {"name": TEXT, "arguments": {...}}}, ...]'
#: The keys of a call and of its function; some datasets omit the level ``function``.
CALL_KEYS = frozenset({"id", "type", "function", "name", "arguments"})
FUNCTION_KEYS = frozenset({"name", "arguments"})
#: Keys of a JSON schema that may be null; elsewhere in a table (parquet), null is an absent key.
_NULLABLE = frozenset({"default", "const", "example"})


def read_list(value: Any, label: str, allowed: str) -> list[Any]:
    """Read a list or the JSON text of one; null and blank text are empty. Raises DataError."""
    if _is_blank(value):
        return []
    found = _parse(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise DataError(f"{label} {shown(value)}; allowed: {allowed}, or its JSON text")
    return found


def read_tools(value: Any, column: str) -> tuple[dict[str, Any], ...] | None:
    """Read the tools of a row; None if there are none.

    Raises DataError for anything but a list of objects or the JSON text of one.
    """
    allowed = '[{"type": "function", "function": {"name": TEXT, ...}}, ...]'
    tools = read_list(value, f"column {column!r} =", allowed)
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, dict) or not tool:
            where = f"column {column!r}, tool {number}"
            raise DataError(f"{where}: {shown(tool)}; allowed: an object, as in {allowed}")
    if not isinstance(value, str):
        tools = _without_nulls(tools, _NULLABLE)
    return tuple(tools) or None


def read_calls(value: Any, where: str, columnar: bool) -> list[dict[str, Any]]:
    """Read a message's ``tool_calls``, with their arguments as mappings.

    ``columnar`` means that null arguments are absent (``is_columnar``). Raises DataError.
    """
    calls = read_list(value, f"{where}: tool_calls =", CALLS_ALLOWED)
    return [
        _call(call, f"{where}, tool call {number}", columnar)
        for number, call in enumerate(calls, 1)
    ]


def read_call_text(value: Any, where: str) -> list[dict[str, Any]]:
    """Read ShareGPT's ``function_call`` message: the JSON text of ``{"name", "arguments"}``, or of
    a list of these. Raises DataError."""
    found = _parse(value) if isinstance(value, str) else value
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
    """Whether the messages come from a table, such as parquet: all have the same keys, and absent
    values are null, also inside the arguments of a call."""
    rows = [message for message in messages if isinstance(message, dict)]
    keys = {frozenset(row) for row in rows}
    return len(keys) == 1 and any(value is None for row in rows for value in row.values())


def render_calls(
    render: Callable[[Sequence[Message]], _Rendered],
    messages: Sequence[Message],
    text_of: Callable[[_Rendered], str],
) -> _Rendered:
    """Return ``render(messages)``, with calls' arguments in the form that the template expects.

    Most templates expect a mapping. JSON text is used if the template fails on a mapping, or prints
    it in Python's notation. Raises the error of ``render`` for the mapping.
    """
    if not any(message.get("tool_calls") for message in messages):
        return render(messages)
    as_mappings = [_with_arguments(message, _as_mapping) for message in messages]
    as_text = [_with_arguments(message, _as_text) for message in messages]
    try:
        found = render(as_mappings)
    except Exception:  # a template may raise anything
        try:
            return render(as_text)
        except Exception:
            pass
        raise
    text = text_of(found)
    printed = any(repr(arguments) in text for arguments in _distinct_in_python(as_mappings))
    return render(as_text) if printed else found


def _call(call: Any, where: str, columnar: bool) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise DataError(f"{where}: {shown(call)}; allowed: an object, as in {CALLS_ALLOWED}")
    if call.get("type") not in (None, "function"):
        raise DataError(f"{where}: type = {shown(call['type'])}; allowed: function")
    read = {"name": name, "arguments": _read_arguments(function.get("arguments"), where, columnar)}
    if function is not call:
        read = {"function": read}
    given = {key: call[key] for key in ("id", "type") if call.get(key) is not None}
    return {**given, **read}


def _read_arguments(value: Any, where: str, columnar: bool) -> dict[str, Any]:
    found = {} if _is_blank(value) else _as_mapping(value)
    if not isinstance(found, dict):
        raise DataError(
            f"{where}: arguments = {shown(value)}; allowed: a JSON object, or the text of one"
        )
    return _without_nulls(found) if columnar and found is value else found


def _distinct_in_python(messages: Sequence[Message]) -> Iterator[Any]:
    """Yield the arguments that look different in Python's notation and in JSON."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments = call.get("function", call).get("arguments")
            if isinstance(arguments, dict) and repr(arguments) != _as_text(arguments):
                yield arguments


def _with_arguments(message: Message, convert: Callable[[Any], Any]) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_converted(call, convert) for call in calls]}


def _converted(call: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _converted(call["function"], convert)}
    return {**call, "arguments": convert(call["arguments"])} if "arguments" in call else {**call}


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _as_mapping(arguments: Any) -> Any:
    """Parse the text of a JSON object; return anything else unchanged."""
    found = _parse(arguments) if isinstance(arguments, str) else None
    return found if isinstance(found, dict) else arguments


def _parse(text: str) -> Any:
    """The value of a JSON text; None if it is not JSON, or has half a character (a surrogate)."""
    try:
        found = json.loads(text)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except (ValueError, RecursionError):
        return None


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _without_nulls(value: Any, kept: frozenset[str] = frozenset()) -> Any:
    """Remove keys whose value is null, at any depth, except those in ``kept``."""
    if isinstance(value, list):
        return [_without_nulls(item, kept) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_nulls(item, kept)
        for key, item in value.items()
        if item is not None or key in kept
    }
