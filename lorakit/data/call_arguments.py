"""The arguments of tool calls, in the form that a chat template expects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

Message = Mapping[str, Any]
_Rendered = TypeVar("_Rendered")


def with_fitting_arguments(
    render: Callable[[Sequence[Message]], _Rendered],
    messages: Sequence[Message],
    text_of: Callable[[_Rendered], str],
) -> _Rendered:
    """``render(messages)`` with the arguments of each call as a mapping, which most templates
    expect, or as JSON text where the template fails on a mapping or prints Python's form of it.

    Raises what ``render`` raises for the mapping.
    """
    mappings = [arguments for message in messages for arguments in _arguments(message)]
    if not mappings:
        return render(messages)
    as_text = [_with_text(message) for message in messages]
    try:
        found = render(messages)
    except Exception:  # a template raises what it likes
        try:
            return render(as_text)
        except Exception:
            pass
        raise
    text = text_of(found)
    printed = any(repr(arguments) in text for arguments in mappings if _differs(arguments))
    return render(as_text) if printed else found


def _arguments(message: Message) -> Iterator[dict[str, Any]]:
    for call in message.get("tool_calls") or ():
        arguments = call.get("function", call).get("arguments")
        if isinstance(arguments, dict):
            yield arguments


def _differs(arguments: dict[str, Any]) -> bool:
    return repr(arguments) != _text(arguments)


def _text(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _with_text(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_call_with_text(call) for call in calls]}


def _call_with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _call_with_text(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": _text(arguments) if isinstance(arguments, dict) else arguments}
