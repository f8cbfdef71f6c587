"""The turns of a long chat whose earlier turns are rendered differently once later ones follow.

A template that does so, as one that leaves the reasoning out of earlier turns, mostly renders what
stands before the last question alike in every prompt. So each turn is rendered behind its question
and the beginning of the chat alone, and its prompt begins with what stands before the question in
the last turn's prompt. The first and the last turn of each kind, and one in the middle, are
rendered in full and must be the same; a chat where one is not is rendered turn by turn, which costs
as many renderings as the chat has turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorakit.data.chat.kinds import Kind, TurnKinds
from lorakit.data.chat.marking import place_contents
from lorakit.data.chat.template import PROBE, ChatTemplate, Message, Tools
from lorakit.data.chat.turns import Turn, TurnReader
from lorakit.errors import DataError

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
