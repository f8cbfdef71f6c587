"""The turns of a long chat, placed in one rendering of the whole and checked at a few.

Rendering each turn's prompt costs half as many renderings of the chat as it has turns. Here the
text between a message and the answer to it is learnt from the first turn of each kind and looked
for at the others; the last turn of each kind is rendered by itself once more. Turns are of one kind
if nothing differs between them that the template's source names: the roles around them, the keys
that they have, which of the template's string literals stand in their texts, and the text that the
template writes before them. A chat of many kinds is rendered turn by turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorakit.data.chat.kinds import Kind, TurnKinds
from lorakit.data.chat.marking import place_contents
from lorakit.data.chat.template import ChatTemplate, Message, Rendered, Span, Tools
from lorakit.data.chat.turns import Turn, TurnReader, marked_turn

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
