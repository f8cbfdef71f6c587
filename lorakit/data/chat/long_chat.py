"""Which turns of a chat a template has to render alike.

The turns of a long chat, placed in one rendering of the whole and checked at a few.

Rendering each turn's prompt costs half as many renderings of the chat as it has turns. Here the
text between a message and the answer to it is learnt from the first turn of each kind and looked
for at the others; the last turn of each kind is rendered by itself once more. Turns are of one kind
if nothing differs between them that the template's source names: the roles around them, the keys
that they have, which of the template's string literals stand in their texts, and the text that the
template writes before them. A chat of many kinds is rendered turn by turn.

The turns of a long chat whose earlier turns are rendered differently once later ones follow.

A template that does so, as one that leaves the reasoning out of earlier turns, mostly renders what
stands before the last question alike in every prompt. So each turn is rendered behind its question
and the beginning of the chat alone, and its prompt begins with what stands before the question in
the last turn's prompt. The first and the last turn of each kind, and one in the middle, are
rendered in full and must be the same; a chat where one is not is rendered turn by turn, which costs
as many renderings as the chat has turns.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
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

_NUMBER = re.compile("[0-9]+")

#: Equal for turns of one kind.
Kind = tuple[Hashable, ...]
#: What a template can see of one message.
_Features = frozenset[tuple[Hashable, ...]]
#: Of literals that were seen earlier in the chat only longer ones count.
_LONG_ENOUGH = 3


@dataclass
class TurnKinds:
    """``places`` are those of the contents of ``messages`` in ``text``, the whole chat's."""

    messages: Sequence[Message]
    text: str
    places: Sequence[Span | None]
    template: ChatTemplate

    def tell(self, tools: Tools) -> bool:
        """Learn the kinds. False where the template may tell turns apart in a way not seen here."""
        tests = template_tests(self.template.source(tools))
        if tests.by_size:
            return False
        roles = {message["role"] for message in self.messages}
        literals = [text for text in tests.literals if text not in roles]
        tests = replace(tests, literals=tuple(literals))
        self._tests = tests
        self._features = [self._of_message(message, tests) for message in self.messages]
        self._before = list(self._earlier(literals))
        return True

    def kind(self, index: int) -> Kind:
        """Of message ``index``, a turn of the assistant's."""
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
        """Whether an earlier message is the same as message ``index``."""
        return bool(index and index > 0 and self.messages[index] in self.messages[:index])

    def _of_message(self, message: Message, tests: TemplateTests) -> _Features:
        return frozenset(self._seen(message, tests))

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
        """Before each message: the literals that an earlier one has, the one seen last first."""
        last: dict[str, int] = {}
        for index, message in enumerate(self.messages):
            yield tuple(sorted(last, key=lambda text: (-last[text], text)))
            texts = [_text_of(message, key) for key in message if key != "role"]
            for literal in literals:
                if len(literal) >= _LONG_ENOUGH and any(literal in text for text in texts):
                    last[literal] = index

    def _lead(self, index: int) -> str | None:
        """What the template writes between the content of the message before a turn and the turn's
        own, its reasoning and its numbers aside; None where one of the two is not there whole."""
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


_DIGITS = re.compile("[0-9]+")

#: Chats whose turns cost no more than so many renderings of the chat are rendered turn by turn.
EXACT_COST = 6
#: Messages of a chat so short that its cost does not matter.
_FREE = 40
#: Renderings of the whole that the checks of a long chat may cost.
_CHECKS_COST = 6
#: Renderings of the whole that the first turns of the kinds may cost.
_KINDS_COST = 9


def is_long(indices: Sequence[int]) -> bool:
    """Whether the turns ``indices`` are too many to render each by itself, twice."""
    cost = sum(2 * index + 1 for index in indices)
    return cost > EXACT_COST * (indices[-1] + 1) + _FREE


@dataclass
class LongChat:
    """The chat up to the last of the turns ``indices``."""

    messages: Sequence[Message]
    tools: Tools
    indices: Sequence[int]
    template: ChatTemplate
    reader: TurnReader

    def turns(self) -> list[Turn] | None:
        """The turns, each of whose texts the next one's begins with. None where the template
        renders an earlier turn differently once a later one follows, or that cannot be told.

        Raises DataError as ``TurnReader.read`` does.
        """
        last = self.indices[-1]
        self._whole = self.template.render(self.messages[: last + 1], self.tools)
        places = place_contents(
            self._whole.text, self.messages[: last + 1], self.tools, self.template
        )
        if places is None:
            return None
        self._places = places
        kinds = TurnKinds(self.messages[: last + 1], self._whole.text, places, self.template)
        if not kinds.tell(self.tools):
            return None
        self._kinds = {index: kinds.kind(index) for index in self.indices}
        if self._firsts_cost() > _KINDS_COST * (last + 1):
            return None
        firsts: dict[Kind, Turn] = {}
        found = []
        for index in self.indices:
            kind = self._kinds[index]
            if kind not in firsts:
                turn = self.reader.read(self.messages, self.tools, index)
                if not self._stands(turn):
                    return None
                firsts[kind] = turn
            placed = self._placed(index, firsts[kind])
            if placed is None:
                return None
            found.append(placed)
        rendered = {turn.index for turn in firsts.values()}
        return found if self._checked(found, rendered) else None

    def _firsts_cost(self) -> int:
        firsts: dict[Kind, int] = {}
        for index in self.indices:
            firsts.setdefault(self._kinds[index], index)
        return sum(2 * index + 1 for index in firsts.values())

    def _stands(self, turn: Turn) -> bool:
        return self._whole.text.startswith(turn.text)

    def _placed(self, index: int, first: Turn) -> Turn | None:
        """Turn ``index``, with what surrounds it as at ``first``, which is of the same kind."""
        if index == first.index:
            return first
        text = self._whole.text
        header = text[self._end_before(first.index) : len(first.prompt)]
        between = text[len(first.text) : self._start_after(first.index)]
        if header[-1:].isdigit() or between[:1].isdigit():  # a number might end anywhere
            return None
        start, stop = self._end_before(index), self._start_after(index)
        behind_header = _numbered(header).match(text, start, stop)
        if not behind_header:
            return None
        begin = behind_header.end()
        before_next = _numbered(between, at_end=True).search(text, begin, stop)
        if not before_next or before_next.start() <= begin:
            return None
        end = before_next.start()
        end = self.reader.single_end(text, end)
        prompt = text[:begin]
        if not self.template.marks(self.tools):
            return Turn(index, prompt, text[begin:end], ((0, end - begin),), first.tail)
        stretches = tuple(span for span in self._whole.marked if span[0] < end)
        turn = marked_turn(index, prompt, Rendered(text, stretches), begin, end)
        return replace(turn, tail=first.tail) if len(turn.text) == end else None

    def _end_before(self, index: int) -> int:
        """Where the content of the last message before ``index`` that has one ends."""
        return next((place[1] for place in reversed(self._places[:index]) if place), 0)

    def _start_after(self, index: int) -> int:
        """Where the content of the first message behind ``index`` that has one begins."""
        following: list[Span | None] = self._places[index + 1 :]
        return next((place[0] for place in following if place), len(self._whole.text))

    def _checked(self, turns: Sequence[Turn], known: set[int]) -> bool:
        """Whether the last turn of each kind, one before the last question and one in the middle
        have the prompts that the template renders for them, where they are not ``known`` to, and
        ``turns`` stand one in another."""
        lasts = {self._kinds[turn.index]: turn for turn in turns}
        asked = [i for i in range(turns[-1].index) if self.messages[i]["role"] == "user"]
        before = [turn for turn in turns if asked and turn.index < asked[-1]][-1:]
        chosen = {turn.index: turn for turn in (*before, *lasts.values(), turns[len(turns) // 2])}
        left = _CHECKS_COST * len(self.messages)
        for index in chosen.keys() - known - {0}:
            left -= index
            if left < 0:
                break
            messages = self.messages[:index]
            prompt = self.template.render(messages, self.tools, generation_prompt=True)
            if prompt.text != chosen[index].prompt:
                return False
        ends = [0, *(len(turn.text) for turn in turns)]
        return all(end <= len(turn.prompt) for end, turn in zip(ends, turns, strict=False))


def _numbered(text: str, at_end: bool = False) -> re.Pattern[str]:
    """What reads as ``text``, but that its numbers may be others, as those of turns are."""
    pattern = "[0-9]+".join(re.escape(part) for part in _DIGITS.split(text))
    return re.compile(pattern + r"\Z" if at_end else pattern)


#: Renderings of the whole that the turns and the checks may cost, each.
_COST = 8


@dataclass
class SplitChat:
    """The chat up to the last of the turns ``indices``."""

    messages: Sequence[Message]
    tools: Tools
    indices: Sequence[int]
    template: ChatTemplate
    reader: TurnReader

    def turns(self) -> list[Turn] | None:
        """The turns; None where the template renders one otherwise in full, where that cannot be
        told, or where it costs more than rendering them one by one.

        Raises DataError as ``TurnReader.read`` does.
        """
        last = self.indices[-1]
        before = self.messages[:last]
        self._front = self.template.render(before, self.tools, generation_prompt=True).text
        places = place_contents(self._front, before, self.tools, self.template, True)
        if not places:
            return None
        self._places = places
        kinds = TurnKinds(self.messages[: last + 1], self._front, [*places, None], self.template)
        if not kinds.tell(self.tools):
            return None
        checked = self._checked({index: kinds.kind(index) for index in self.indices})
        windows = {index: self._window(index) for index in self.indices}
        costs = [len(window) if window else index for index, window in windows.items()]
        if max(sum(checked), sum(costs)) * 2 > _COST * last:
            return None
        turns = []
        for index, window in windows.items():
            turn = self._placed(index, window) if window else None
            if turn is None or index in checked:
                full = self.reader.read(self.messages, self.tools, index)
                if turn is not None and full != turn:
                    return None
                turn = full
            turns.append(turn)
        return turns

    def _checked(self, kinds: dict[int, Kind]) -> set[int]:
        firsts: dict[Kind, int] = {}
        for index, kind in kinds.items():
            firsts.setdefault(kind, index)
        lasts = {kind: index for index, kind in kinds.items()}
        return {*firsts.values(), *lasts.values(), self.indices[len(self.indices) // 2]}

    def _window(self, index: int) -> list[Message] | None:
        """The chat's beginning, with an answer of its own, and the messages from the last question
        before ``index`` on; None where no plain answer stands before that question."""
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

    def _placed(self, index: int, window: list[Message]) -> Turn | None:
        """The turn as ``window`` has it, behind what stands before its question in the chat."""
        place = self._places[self._question(index) - 1]
        try:
            turn = self.reader.read(window, self.tools, len(window) - 1)
        except DataError:  # as the template does of the turn in full, or of the window alone
            return None
        _, found, behind = turn.prompt.rpartition(PROBE)
        if not found or place is None:
            return None
        return replace(turn, index=index, prompt=self._front[: place[1]] + behind)
