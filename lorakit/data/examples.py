"""What a task makes of a row, before any token exists.

The arguments of tool calls, in the form that a chat template expects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar


@dataclass(frozen=True)
class Segment:
    """A stretch of text; the loss is taken on it only if ``trained``."""

    text: str
    trained: bool


@dataclass(frozen=True)
class TextExample:
    """Segments in order, tokenised one by one so that a prompt reads alike in training and in
    generation; ``eos`` appends the end token, trained like the last segment."""

    segments: tuple[Segment, ...]
    eos: bool = True


@dataclass(frozen=True)
class ChatExample:
    """A chat that the tokenizer's chat template renders.

    ``messages`` are what the template receives: ``role``, ``content`` and any further key it may
    read. ``trained`` has one flag per message, true for the assistant turns that the loss is taken
    on; None trains all of them. ``tools`` is passed to the template (OpenAI's JSON schemas).
    """

    messages: tuple[Mapping[str, Any], ...]
    trained: tuple[bool, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None

    def is_trained(self, index: int) -> bool:
        """Whether the loss is taken on message ``index``."""
        if self.trained is not None:
            return self.trained[index]
        return bool(self.messages[index]["role"] == "assistant")


@dataclass(frozen=True)
class ClassificationExample:
    """A text or a pair of texts; ``label`` is a class index, or a float for regression."""

    text: str
    text_pair: str | None
    label: int | float


Example = TextExample | ChatExample | ClassificationExample


Message = Mapping[str, Any]
_Rendered = TypeVar("_Rendered")


def with_fitting_arguments(
    render: Callable[[Sequence[Message]], _Rendered],
    messages: Sequence[Message],
    text_of: Callable[[_Rendered], str],
) -> _Rendered:
    """``render(messages)`` with the arguments of each call as a mapping, which most templates
    expect, or as JSON text where the template fails on a mapping or prints Python's form of it.
    Which of the two ``messages`` hold makes no difference.

    Raises what ``render`` raises for the mapping.
    """
    if not any(message.get("tool_calls") for message in messages):
        return render(messages)
    mapped = [_with_arguments(message, _mapping) for message in messages]
    as_text = [_with_arguments(message, _text) for message in messages]
    try:
        found = render(mapped)
    except Exception:  # a template raises what it likes
        try:
            return render(as_text)
        except Exception:
            pass
        raise
    text = text_of(found)
    printed = any(repr(arguments) in text for arguments in _differing(mapped))
    return render(as_text) if printed else found


def _differing(messages: Sequence[Message]) -> Iterator[Any]:
    """The mappings that Python prints otherwise than JSON does."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments = call.get("function", call).get("arguments")
            if isinstance(arguments, dict) and repr(arguments) != _text(arguments):
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


def _text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _mapping(arguments: Any) -> Any:
    """Anything but the text of a JSON object stays what it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments
