"""Where the contents of a chat's messages stand in its text, found with one more rendering."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorakit.data.chat.template import ChatTemplate, Message, Span, Tools
from lorakit.data.chat.turns import content_text, with_content

_OPEN, _CLOSE = "\u2063\u2064", "\u2064\u2063"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


def marked(messages: Sequence[Message], strip: bool = False) -> list[Message]:
    """The messages, each content that holds text between two marks of its own."""
    return [
        with_content(message, f"{_mark(2 * index)}{text.strip() if strip else text}"
                              f"{_mark(2 * index + 1)}")
        if (text := content_text(message)).strip()
        else message
        for index, message in enumerate(messages)
    ]  # fmt: skip


def seen(text: str) -> set[int]:
    """The messages of which ``text``, rendered from ``marked`` ones, has anything."""
    return {number // 2 for number in ends_seen(text)}


def ends_seen(text: str) -> set[int]:
    """The marks in ``text``: ``2 * i`` and ``2 * i + 1`` open and close the content of message
    ``i``."""
    return {int(found.group(1)) for found in _MARK.finditer(text)}


def place_contents(
    text: str,
    messages: Sequence[Message],
    tools: Tools,
    template: ChatTemplate,
    generation_prompt: bool = False,
) -> list[Span | None] | None:
    """Where the content of each message stands in ``text``, which ``template`` made of them; None
    for a message whose content does not stand there whole. None for all if it cannot be told."""
    for strip in (False, True):
        rendered = template.render(marked(messages, strip), tools, generation_prompt).text
        if _MARK.sub("", rendered) == text:
            return _places(rendered, len(messages))
    return _in_order(text, messages)


def _places(rendered: str, count: int) -> list[Span | None]:
    ends: dict[int, int] = {}
    removed = 0
    for found in _MARK.finditer(rendered):
        ends.setdefault(int(found.group(1)), found.start() - removed)
        removed += len(found.group())
    return [
        (ends[2 * i], ends[2 * i + 1]) if 2 * i in ends and 2 * i + 1 in ends else None
        for i in range(count)
    ]


def _in_order(text: str, messages: Sequence[Message]) -> list[Span | None] | None:
    places: list[Span | None] = []
    end = 0
    for message in messages:
        content = content_text(message).strip()
        if not content:
            places.append(None)
            continue
        start = text.find(content, end)
        if start < 0:
            return None
        end = start + len(content)
        places.append((start, end))
    return places


def _mark(number: int) -> str:
    return f"{_OPEN}{number}{_CLOSE}"
