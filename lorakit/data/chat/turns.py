"""Read an assistant turn from a rendered chat: the prompt that generation gets, and the answer.

The contents of messages are located in the text by rendering it once more with marks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lorakit.data.chat.template import (
    PROBE,
    REASONING,
    ChatTemplate,
    Message,
    Rendered,
    Span,
    Tools,
)
from lorakit.errors import DataError

_END_OF_REASONING = "</think>"
#: In characters; special tokens are shorter.
_LONGEST_TOKEN = 100


@dataclass(frozen=True)
class Turn:
    """The assistant turn at message ``index``.

    ``answer`` is the text between ``prompt`` and the end-of-turn token, inclusive. ``trained`` are
    the spans of ``answer`` that count in the loss; the template may mark a part of it. ``tail`` is
    the text that the template writes after the answer if no message follows.

    ``differs``: the rendering of the finished chat does not begin with ``prompt``.
    ``without_reasoning``: the prompt already closes the reasoning, so the turn's is omitted.
    ``marked_early``: a mark begins within the prompt; it is trained from the end of the prompt on.
    ``is_whole_chat``: ``answer`` is the whole chat up to message ``index``, of any role.
    ``weight`` is that of the trained tokens in the loss; tokens within the spans ``masked`` of
    ``answer`` are not trained.
    """

    index: int
    prompt: str
    answer: str
    trained: tuple[Span, ...]
    tail: str = ""
    differs: bool = False
    marked_early: bool = False
    without_reasoning: bool = False
    is_whole_chat: bool = False
    weight: float = 1.0
    masked: tuple[Span, ...] = ()

    @property
    def text(self) -> str:
        return self.prompt + self.answer

    def marked_in(self, chat: Rendered) -> Turn:
        """The turn, trained only where ``chat``, the rendering of the whole chat, marks it too. If
        ``chat`` does not begin with the turn's text, the turn is unchanged."""
        if not chat.text.startswith(self.text):
            return self
        start = len(self.prompt)
        common = (
            (max(a, begin - start), min(b, end - start))
            for a, b in self.trained
            for begin, end in chat.marked
        )
        return replace(self, trained=tuple((a, b) for a, b in common if a < b))


@dataclass
class TurnReader:
    """Renders a turn as the prompt and as the finished chat, and compares the two."""

    template: ChatTemplate
    _tails: dict[str, str] = field(default_factory=dict)

    def read(self, messages: Sequence[Message], tools: Tools, index: int) -> Turn:
        """Read turn ``index`` of the chat.

        Raises DataError if the template rejects the messages or omits the turn.
        """
        finished = self.template.render(messages[: index + 1], tools)
        prompt = self._prompt(messages, tools, index)
        differs = not finished.text.startswith(prompt)
        begin, without_reasoning = len(prompt), False
        if differs:
            begin, without_reasoning = self._aligned(prompt, finished, messages, tools, index)
        end = self.end(finished.text, messages, tools, index)
        if end <= begin:
            raise DataError(f"message {index + 1}: the chat template omits the assistant's turn")
        if not self.template.marks(tools):
            answer, tail = finished.text[begin:end], finished.text[end:]
            turn = Turn(index, prompt, answer, ((0, end - begin),), tail, differs)
        else:
            turn = marked_turn(index, prompt, finished, begin, end, differs)
        return replace(turn, without_reasoning=without_reasoning)

    def _prompt(self, messages: Sequence[Message], tools: Tools, index: int) -> str:
        if index:
            return self.template.render(messages[:index], tools, generation_prompt=True).text
        # Generation needs a message: the prompt of the first one is the text before it.
        probe = [_probe(messages[0])]
        return self.template.render(probe, tools).text.partition(PROBE)[0]

    def _aligned(
        self,
        prompt: str,
        finished: Rendered,
        messages: Sequence[Message],
        tools: Tools,
        index: int,
    ) -> tuple[int, bool]:
        """Find where the answer begins in a text that does not begin with ``prompt``, and whether
        that omits the turn's reasoning.

        It begins at the end of the longest common suffix with the prompt: not before the end of the
        previous message or of the common prefix, and not after the first character that depends on
        the turn or the end of its reasoning.
        """
        other = self.template.render([*messages[:index], _probe(messages[index])], tools).text
        place = common_prefix(finished.text, other)
        before = content_text(messages[index - 1]).strip() if index else ""
        found = finished.text.rfind(before, 0, place)
        first = max(found + len(before) if found >= 0 else 0, common_prefix(prompt, finished.text))
        last = max(place, _after_reasoning(finished.text, messages[index]))
        begin = max(
            range(min(first, place), last + 1),
            key=lambda end: (_common_suffix(prompt, finished.text, end), end),
        )
        return begin, begin > place

    def end(self, text: str, messages: Sequence[Message], tools: Tools, index: int) -> int:
        """Find the end of the last turn's answer in ``text``: the end of the first special token
        that the template writes after it, or of the last visible character if there is none."""
        source = self.template.source(tools)
        tail = self._tails.get(source)
        if tail is None or not self._fits(tail, text):
            tail = self._tail(messages, tools, index)
            if tail is None or not text.endswith(tail):
                return self._last_end(text)
            self._tails.setdefault(source, tail)
        return self.single_end(text, len(text) - len(tail) + self._end_in(tail))

    def _end_in(self, tail: str) -> int:
        """The end of the answer in ``tail``. Special tokens directly after the first are included,
        up to EOS."""
        found = self.template.special.search(tail) or self.template.added.search(tail)
        if not found:
            return len(tail.rstrip())
        eos = self.template.tokenizer.eos_token
        while found.group() != eos and (more := self.template.special.match(tail, found.end())):
            found = more
        return found.end()

    def single_end(self, text: str, end: int) -> int:
        """Return ``end``, or if the content already ends with the same end-of-turn token, the end
        of that one."""
        token = _last_special(self.template, text[:end])
        while token and (before := text[: end - len(token)].rstrip()).endswith(token):
            end = len(before)
        return end

    def _fits(self, tail: str, text: str) -> bool:
        """Whether the tail of another turn is also the tail of this one. A tail without a special
        token does not fit a text that ends with one."""
        special = self.template.special.search(tail)
        return text.endswith(tail) and bool(special or not _last_special(self.template, text))

    def _tail(self, messages: Sequence[Message], tools: Tools, index: int) -> str | None:
        """The text that the template writes after a plain answer; None if it rejects one here."""
        try:
            text = self.template.render([*messages[:index], _probe(messages[index])], tools).text
        except DataError:
            return None
        _, found, tail = text.rpartition(PROBE)
        return tail if found else None

    def _last_end(self, text: str) -> int:
        """The end of the first special token in the run of them that ends ``text``."""
        end = len(text.rstrip())
        first = end
        while token := _last_special(self.template, text[:end]):
            first = end
            end = len(text[: end - len(token)].rstrip())
        return first


def marked_turn(
    index: int, prompt: str, text: Rendered, begin: int, end: int, differs: bool = False
) -> Turn:
    """The turn whose answer is ``text`` from ``begin`` to the end of the last mark. Without a mark
    it extends to ``end`` and is not trained."""
    marked = [(start, stop) for start, stop in text.marked if stop > begin]
    stop = max((stop for _, stop in marked), default=end)
    spans = tuple((max(a, begin) - begin, b - begin) for a, b in marked)
    early = any(start < begin for start, _ in marked)
    return Turn(index, prompt, text.text[begin:stop], spans, text.text[stop:], differs, early)


def content_text(message: Message) -> str:
    """The message's content, with the texts of parts joined; empty if it has none."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return "".join(text for text in texts if isinstance(text, str))


def with_content(message: Message, text: str) -> dict[str, object]:
    """Replace the message's content by ``text``, as a list of parts if it was one."""
    if isinstance(message.get("content"), list):
        return {**message, "content": [{"type": "text", "text": text}]}
    return {**message, "content": text}


def _after_reasoning(text: str, message: Message) -> int:
    """Where the answer begins after the message's reasoning, which is in a key or in the content; 0
    without reasoning, or if the answer is not found in ``text``."""
    content = content_text(message)
    _, closed, answer = content.rpartition(_END_OF_REASONING)
    if not closed and not any(message.get(key) for key in REASONING):
        return 0
    if answer := answer.strip():
        return max(text.rfind(answer), 0)
    _, closed, calls = text.rpartition(_END_OF_REASONING)
    return len(text) - len(calls.lstrip()) if closed else 0


def _probe(message: Message) -> dict[str, object]:
    """Replace ``message`` by a plain answer."""
    plain = {"role": message["role"], "content": message.get("content")}
    return with_content(plain, PROBE)


def common_prefix(text: str, other: str) -> int:
    """The length of the common prefix."""
    most = min(len(text), len(other))
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if text[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_suffix(text: str, other: str, end: int) -> int:
    """The length of the common suffix of ``text`` and ``other[:end]``."""
    count, most = 0, min(len(text), end)
    while count < most and text[-1 - count] == other[end - 1 - count]:
        count += 1
    return count


def _last_special(template: ChatTemplate, text: str) -> str:
    """The special token with which ``text`` ends, ignoring whitespace; empty if there is none."""
    end = len(text.rstrip())
    tokens = template.special.finditer(text, max(0, end - _LONGEST_TOKEN), end)
    return next((found.group() for found in tokens if found.end() == end), "")


# Locating contents

_OPEN, _CLOSE = "\u2063\u2064", "\u2064\u2063"
MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


def marked(messages: Sequence[Message], strip: bool = False) -> list[Message]:
    """The messages, with each non-blank content between two unique marks."""
    return [
        with_content(message, f"{mark(2 * index)}{text.strip() if strip else text}"
                              f"{mark(2 * index + 1)}")
        if (text := content_text(message)).strip()
        else message
        for index, message in enumerate(messages)
    ]  # fmt: skip


def seen(text: str) -> set[int]:
    """The indices of messages with a mark in ``text``, the rendering of ``marked`` messages."""
    return {number // 2 for number in ends_seen(text)}


def ends_seen(text: str) -> set[int]:
    """The marks in ``text``: ``2 * i`` and ``2 * i + 1`` surround the content of message ``i``."""
    return {int(found.group(1)) for found in MARK.finditer(text)}


def place_contents(
    text: str,
    messages: Sequence[Message],
    tools: Tools,
    template: ChatTemplate,
    generation_prompt: bool = False,
) -> list[Span | None] | None:
    """Find the span of each message's content in ``text``, the rendered chat; None for a content
    that is not completely there. Returns None if the spans cannot be determined."""
    for strip in (False, True):
        rendered = template.render(marked(messages, strip), tools, generation_prompt).text
        if MARK.sub("", rendered) == text:
            return _places(rendered, len(messages))
    return _in_order(text, messages)


def _places(rendered: str, count: int) -> list[Span | None]:
    ends: dict[int, int] = {}
    removed = 0
    for found in MARK.finditer(rendered):
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


def mark(number: int) -> str:
    """A mark, which ``MARK`` matches; no chat contains one."""
    return f"{_OPEN}{number}{_CLOSE}"
