"""Render the turns of a long chat without rendering the chat once per turn.

Rendering each turn's prompt costs as much as n / 2 renderings of a chat with n turns. Two
shortcuts, both verified on some turns, avoid that where they apply.

- ``SharedRendering``: the template renders the beginning of the chat identically in every prompt.
  The turns are located in a single rendering of the whole chat.
- ``WindowedRendering``: the template changes earlier turns once later ones follow, for example by
  dropping their reasoning, but renders everything before the last question identically in every
  prompt. Each turn is rendered after only the beginning of the chat and its question.

Turns are of the same kind if they agree in everything that the template's source mentions: the
roles around them, their keys, the template's string literals in their texts, and the text that it
writes before them.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lorakit.data.chat.template import (
    PAYLOAD,
    PROBE,
    REASONING,
    ChatTemplate,
    Message,
    Rendered,
    Span,
    TemplateTests,
    Tools,
    template_tests,
)
from lorakit.data.chat.turns import Turn, TurnReader, content_text, marked_turn, place_contents
from lorakit.errors import DataError

#: Chats whose turns cost at most this many renderings of the chat are rendered turn by turn.
EXACT_COST = 6
#: Added to the allowed cost, in messages: the cost of a short chat does not matter.
_FREE_COST = 40
#: Limits, in renderings of the whole chat: for verification, first turns of all kinds, windows.
_CHECKS_COST = 6
_KINDS_COST = 9
_WINDOWS_COST = 8
#: Literals in earlier messages are considered only if they are at least this long.
_MIN_EARLIER_LITERAL = 3
_NUMBER = re.compile("[0-9]+")

#: Equal for turns of the same kind.
Kind = tuple[Hashable, ...]


def is_long(indices: Sequence[int]) -> bool:
    """Whether the turns ``indices`` are too many to render each of them separately, twice."""
    cost = sum(2 * index + 1 for index in indices)
    return cost > EXACT_COST * (indices[-1] + 1) + _FREE_COST


def long_chat_turns(
    messages: Sequence[Message],
    tools: Tools,
    indices: Sequence[int],
    template: ChatTemplate,
    reader: TurnReader,
) -> list[Turn] | None:
    """Return the turns ``indices`` by one of the shortcuts; None if neither applies.

    Raises the same errors as ``TurnReader.read``.
    """
    given = (messages, tools, indices, template, reader)
    return SharedRendering(*given).turns() or WindowedRendering(*given).turns()


@dataclass
class TurnKinds:
    """Classifies turns. ``places`` are the spans of the contents of ``messages`` in ``text``, the
    rendered chat."""

    messages: Sequence[Message]
    text: str
    places: Sequence[Span | None]
    template: ChatTemplate

    def learn(self, tools: Tools) -> bool:
        """Prepare ``kind``. Return False if the template may distinguish turns in other ways."""
        tests = template_tests(self.template.source(tools))
        if tests.by_size:
            return False
        roles = {message["role"] for message in self.messages}
        literals = [text for text in tests.literals if text not in roles]
        tests = replace(tests, literals=tuple(literals))
        self._tests = tests
        self._features = [frozenset(self._seen(message, tests)) for message in self.messages]
        self._before = list(self._earlier(literals))
        return True

    def kind(self, index: int) -> Kind:
        """The kind of message ``index``, an assistant turn."""
        messages, features = self.messages, self._features
        before = messages[index - 1]["role"] if index else None
        after = messages[index + 1]["role"] if index + 1 < len(messages) else None
        asked = next((i for i in range(index - 1, -1, -1) if messages[i]["role"] == "user"), None)
        return (
            before,
            after,
            features[index],
            features[index - 1] if index else None,
            features[asked] if asked is not None else None,
            self._before[index],
            self._lead(index),
            tuple(index % number for number in self._tests.moduli),
            self._tests.by_equality and self._repeats(index - 1),
            self._tests.by_equality and self._repeats(asked),
        )

    def _repeats(self, index: int | None) -> bool:
        """Whether an earlier message equals message ``index``."""
        return bool(index and index > 0 and self.messages[index] in self.messages[:index])

    def _seen(self, message: Message, tests: TemplateTests) -> Iterator[tuple[Hashable, ...]]:
        for key, value in message.items():
            known = key == "content" or key in PAYLOAD or self.template.mentions(key)
            if key == "role" or value is None or not known:
                continue
            if isinstance(value, bool | int | float):
                yield key, value
                continue
            text = _text_of(message, key)
            if text.strip() and value:
                yield (key,)
            for literal in tests.literals:
                if literal in text:
                    yield key, literal, text.startswith(literal), text.endswith(literal)

    def _earlier(self, literals: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """For each message, the literals of earlier messages, most recent first."""
        last: dict[str, int] = {}
        for index, message in enumerate(self.messages):
            yield tuple(sorted(last, key=lambda text: (-last[text], text)))
            texts = [_text_of(message, key) for key in message if key != "role"]
            for literal in literals:
                if len(literal) >= _MIN_EARLIER_LITERAL and any(literal in text for text in texts):
                    last[literal] = index

    def _lead(self, index: int) -> str | None:
        """The text between the content of the previous message and that of the turn, without its
        reasoning and with numbers normalized; None if the place of either content is unknown."""
        place, before = self.places[index], self.places[index - 1] if index else (0, 0)
        if place is None or before is None:
            return None
        lead = self.text[before[1] : place[0]]
        message = self.messages[index]
        for key in REASONING:
            if reasoning := _text_of(message, key).strip():
                lead = lead.replace(reasoning, "")
        return _NUMBER.sub("0", lead)


def _text_of(message: Message, key: str) -> str:
    value = message.get(key)
    if key == "content":
        return content_text(message)
    return value if isinstance(value, str) else repr(value) if value else ""


@dataclass
class _LongChat:
    """The chat up to the last of the turns ``indices``."""

    messages: Sequence[Message]
    tools: Tools
    indices: Sequence[int]
    template: ChatTemplate
    reader: TurnReader

    def _learn_kinds(self, text: str, places: Sequence[Span | None]) -> dict[int, Kind] | None:
        """The kind of each turn, given the places of all contents in ``text``."""
        kinds = TurnKinds(self.messages[: self.indices[-1] + 1], text, places, self.template)
        if not kinds.learn(self.tools):
            return None
        return {index: kinds.kind(index) for index in self.indices}


def _first_of_each(kinds: dict[int, Kind]) -> dict[Kind, int]:
    return {kind: index for index, kind in reversed(kinds.items())}


class SharedRendering(_LongChat):
    """Learns the text around turns of a kind from the first of them, which is rendered separately,
    and searches for the same text around the others."""

    def turns(self) -> list[Turn] | None:
        """The turns; the text of each begins with that of the previous one. None if the template
        may render an earlier turn differently once a later one follows."""
        chat = self.messages[: self.indices[-1] + 1]
        self._whole = self.template.render(chat, self.tools)
        places = place_contents(self._whole.text, chat, self.tools, self.template)
        if places is None:
            return None
        self._places = places
        kinds = self._learn_kinds(self._whole.text, places)
        if kinds is None:
            return None
        first_indices = _first_of_each(kinds)
        if sum(2 * index + 1 for index in first_indices.values()) > _KINDS_COST * len(chat):
            return None
        firsts: dict[Kind, Turn] = {}
        found = []
        for index in self.indices:
            kind = kinds[index]
            if index == first_indices[kind]:
                turn = self.reader.read(self.messages, self.tools, index)
                if not self._whole.text.startswith(turn.text):
                    return None
                firsts[kind] = turn
            placed = self._place(index, firsts[kind])
            if placed is None:
                return None
            found.append(placed)
        return found if self._verify(found, kinds, {*first_indices.values()}) else None

    def _place(self, index: int, first: Turn) -> Turn | None:
        """Locate turn ``index`` by the text around ``first``, a turn of the same kind."""
        if index == first.index:
            return first
        text = self._whole.text
        header = text[self._end_before(first.index) : len(first.prompt)]
        between = text[len(first.text) : self._start_after(first.index)]
        if header[-1:].isdigit() or between[:1].isdigit():  # where the number ends is ambiguous
            return None
        start, stop = self._end_before(index), self._start_after(index)
        header_match = _numbered(header).match(text, start, stop)
        if not header_match:
            return None
        begin = header_match.end()
        between_match = _numbered(between, at_end=True).search(text, begin, stop)
        if not between_match or between_match.start() <= begin:
            return None
        end = self.reader.single_end(text, between_match.start())
        prompt = text[:begin]
        if not self.template.marks(self.tools):
            return Turn(index, prompt, text[begin:end], ((0, end - begin),), first.tail)
        spans = tuple(span for span in self._whole.marked if span[0] < end)
        turn = marked_turn(index, prompt, Rendered(text, spans), begin, end)
        return replace(turn, tail=first.tail) if len(turn.text) == end else None

    def _end_before(self, index: int) -> int:
        """The end of the last content before message ``index``."""
        return next((place[1] for place in reversed(self._places[:index]) if place), 0)

    def _start_after(self, index: int) -> int:
        """The start of the first content after message ``index``."""
        following: list[Span | None] = self._places[index + 1 :]
        return next((place[0] for place in following if place), len(self._whole.text))

    def _verify(self, turns: Sequence[Turn], kinds: Mapping[int, Kind], known: set[int]) -> bool:
        """Whether turns do not overlap, and some have the prompts that the template renders: the
        last one of each kind, one before the last question and one in the middle, except those
        ``known`` to be correct."""
        lasts = {kinds[turn.index]: turn for turn in turns}
        asked = [i for i in range(turns[-1].index) if self.messages[i]["role"] == "user"]
        before = [turn for turn in turns if asked and turn.index < asked[-1]][-1:]
        chosen = {turn.index: turn for turn in (*before, *lasts.values(), turns[len(turns) // 2])}
        left = _CHECKS_COST * len(self.messages)
        for index in chosen.keys() - known - {0}:
            left -= index
            if left < 0:
                break
            prompt = self.template.render(self.messages[:index], self.tools, generation_prompt=True)
            if prompt.text != chosen[index].prompt:
                return False
        ends = [0, *(len(turn.text) for turn in turns)]
        return all(end <= len(turn.prompt) for end, turn in zip(ends, turns, strict=False))


def _numbered(text: str, at_end: bool = False) -> re.Pattern[str]:
    """A pattern for ``text`` in which every number, which may count turns, matches any number."""
    pattern = "[0-9]+".join(re.escape(part) for part in _NUMBER.split(text))
    return re.compile(pattern + r"\Z" if at_end else pattern)


class WindowedRendering(_LongChat):
    """Renders each turn in a window: the beginning of the chat, a placeholder answer, and the
    messages from the turn's question on. The first and last turn of each kind and one in the middle
    are also rendered in full, and must be equal."""

    def turns(self) -> list[Turn] | None:
        """The turns. None if one of them differs when rendered in full, if the kinds are unknown,
        or if windows cost more than rendering turn by turn."""
        last = self.indices[-1]
        before = self.messages[:last]
        self._front = self.template.render(before, self.tools, generation_prompt=True).text
        places = place_contents(self._front, before, self.tools, self.template, True)
        if not places:
            return None
        self._places = places
        kinds = self._learn_kinds(self._front, [*places, None])
        if kinds is None:
            return None
        lasts = {kind: index for index, kind in kinds.items()}
        middle = self.indices[len(self.indices) // 2]
        checked = {*_first_of_each(kinds).values(), *lasts.values(), middle}
        windows = {index: self._window(index) for index in self.indices}
        costs = [len(window) if window else index for index, window in windows.items()]
        if max(sum(checked), sum(costs)) * 2 > _WINDOWS_COST * last:
            return None
        turns = []
        for index, window in windows.items():
            turn = self._place(index, window) if window else None
            if turn is None or index in checked:
                full = self.reader.read(self.messages, self.tools, index)
                if turn is not None and full != turn:
                    return None
                turn = full
            turns.append(turn)
        return turns

    def _window(self, index: int) -> list[Message] | None:
        """The window of turn ``index``; None if no plain answer precedes its question."""
        first = next((i for i in range(index) if self.messages[i]["role"] == "user"), index)
        begin = self._question(index)
        if begin <= first:
            return None
        answer = self.messages[begin - 1]
        plain = answer["role"] == "assistant" and not answer.get("tool_calls")
        if not plain or self._places[begin - 1] is None:
            return None
        head = self.messages[: first + 1]
        return [*head, {"role": "assistant", "content": PROBE}, *self.messages[begin : index + 1]]

    def _question(self, index: int) -> int:
        """The last question before ``index``; 0 if there is none."""
        asked = (i for i in range(index - 1, -1, -1) if self.messages[i]["role"] == "user")
        return next(asked, 0)

    def _place(self, index: int, window: list[Message]) -> Turn | None:
        """The turn as rendered in ``window``, with the chat's text before its question."""
        place = self._places[self._question(index) - 1]
        try:
            turn = self.reader.read(window, self.tools, len(window) - 1)
        except DataError:  # the template rejects the turn, or only the window
            return None
        _, found, after = turn.prompt.rpartition(PROBE)
        if not found or place is None:
            return None
        return replace(turn, index=index, prompt=self._front[: place[1]] + after)
