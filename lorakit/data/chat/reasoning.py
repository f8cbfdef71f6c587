"""The reasoning of the assistant's turns: in a key of the message, or between ``<think>`` and
``</think>`` in its content. It can be removed, or kept out of the loss."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from lorakit.data.chat.template import REASONING, ChatTemplate, Message, Span, Tools
from lorakit.data.chat.turns import MARK, Turn, content_text, mark, with_content
from lorakit.errors import DataError

#: Content that was generated after a prompt that ends in ``<think>`` has no opening tag.
_BLOCK = re.compile(r"<think>(?P<open>.*?)</think>|\A(?P<bare>(?:(?!<think>).)*?)</think>", re.S)


def without_reasoning(message: Message) -> dict[str, Any]:
    """The message of the assistant without its reasoning; other messages are unchanged."""
    if message["role"] != "assistant":
        return dict(message)
    kept = {key: value for key, value in message.items() if key not in REASONING}
    text, found = _BLOCK.subn("", content_text(message))
    return with_content(kept, text.strip()) if found else kept


def with_masked_reasoning(
    turns: Sequence[Turn], messages: Sequence[Message], tools: Tools, template: ChatTemplate
) -> list[Turn]:
    """The turns with the spans of their reasoning's text in ``masked``. The tags and the
    whitespace around it are not in these spans.

    Raises DataError if the spans cannot be determined.
    """
    found: dict[int, Turn] = {}
    for last in reversed(turns):
        if last.index in found:
            continue
        chat = messages[: last.index + 1]
        text = template.render(chat, tools).text
        spans = _spans(text, chat, tools, template)
        for turn in turns:
            if text.startswith(turn.text) and turn.index not in found:
                found[turn.index] = _masked(turn, spans, len(turn.prompt))
        if last.index not in found:  # the template renders the prompt differently here
            found[last.index] = _masked(last, spans, len(text) - len(last.tail + last.answer))
    return [found[turn.index] for turn in turns]


def _masked(turn: Turn, spans: Sequence[Span], start: int) -> Turn:
    """The turn whose answer begins at ``start``."""
    inside = ((max(0, a - start), min(len(turn.answer), b - start)) for a, b in spans)
    return replace(turn, masked=tuple((a, b) for a, b in inside if a < b))


def _spans(
    text: str, messages: Sequence[Message], tools: Tools, template: ChatTemplate
) -> list[Span]:
    """Where the texts of all reasoning are in ``text``, the rendered chat."""
    numbers = count()
    marked = [_with_marks(message, numbers) for message in messages]
    if not next(numbers):
        return []
    rendered = template.render(marked, tools).text
    if MARK.sub("", rendered) != text:
        raise DataError(
            "task.reasoning = mask: cannot tell where the chat template writes the reasoning; "
            "allowed: train or drop"
        )
    spans, begin, removed = [], 0, 0
    for found in MARK.finditer(rendered):
        place = found.start() - removed
        removed += len(found.group())
        if int(found.group(1)) % 2:
            spans.append((begin, place))
        begin = place
    return spans


def _with_marks(message: Message, numbers: Iterator[int]) -> Message:
    """The message, with each text of its reasoning between two marks."""
    if message["role"] != "assistant":
        return message

    def between_marks(text: str) -> str:
        inner = text.strip()
        if not inner:
            return text
        before, _, after = text.partition(inner)
        return f"{before}{mark(next(numbers))}{inner}{mark(next(numbers))}{after}"

    def block(found: re.Match[str]) -> str:
        name = found.lastgroup or ""
        whole, (begin, end) = found.group(), found.span(name)
        offset = found.start()
        return whole[: begin - offset] + between_marks(found.group(name)) + whole[end - offset :]

    keys = {k: between_marks(message[k]) for k in REASONING if isinstance(message.get(k), str)}
    content = content_text(message)
    with_keys = {**message, **keys}
    text = _BLOCK.sub(block, content)
    return with_keys if text == content else with_content(with_keys, text)
