"""Turns as text -> rows of ids: the prompt's are those of the prompt by itself."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.data.chat.template import ChatTemplate
from lorakit.data.chat.turns import Turn
from lorakit.data.joining import Joiner

#: Characters before a border that decide how the text at it is tokenised, where no token that is
#: split off first stands nearer.
_WINDOW = 400
_COMPARED = 8


@dataclass(frozen=True)
class IdRow:
    """``trained`` marks the ids that the loss is taken on. ``turns`` are the messages that they
    are of. ``straddles``: how many answers begin within the prompt's last token."""

    ids: list[int]
    trained: list[bool]
    turns: tuple[int, ...]
    straddles: int = 0

    @property
    def prompt(self) -> int:
        """How many ids precede the first that is trained."""
        return self.trained.index(True) if True in self.trained else len(self.ids)


def turn_rows(turns: Sequence[Turn], joiner: Joiner) -> list[IdRow]:
    """As few rows as there can be, each turn trained in one of them: a row holds those turns whose
    ids, prompt and answer, its last turn's begin with."""
    texts = [text for turn in turns for text in _prefixes(turn)]
    found = iter(joiner.ids(texts))
    left = [
        (turn, _turn_row(turn, [next(found) for _ in _prefixes(turn)], joiner)) for turn in turns
    ]
    rows = []
    while left:
        last, whole = left[-1]
        within = [row for _, row in left if whole.ids[: len(row.ids)] == row.ids]
        rows.append(_with_tail(_joined(within), last, joiner))
        taken = {turn for row in within for turn in row.turns}
        left = [(turn, row) for turn, row in left if turn.index not in taken]
    return rows[::-1]


def _joined(rows: Sequence[IdRow]) -> IdRow:
    """The last of the rows, which begins with all others, trained where any of them is."""
    trained = [False] * len(rows[-1].ids)
    for row in rows:
        begin = row.prompt
        trained[begin : len(row.ids)] = row.trained[begin:]
    turns = tuple(turn for row in rows for turn in row.turns)
    return IdRow(rows[-1].ids, trained, turns, sum(row.straddles for row in rows))


def _with_tail(row: IdRow, turn: Turn, joiner: Joiner) -> IdRow:
    tail = joiner.inside(turn.tail) if turn.tail else []
    trained = [*row.trained, *(False for _ in tail)]
    return IdRow([*row.ids, *tail], trained, row.turns, row.straddles)


def _cuts(turn: Turn) -> list[tuple[int, bool]]:
    """Where the pieces of the answer end, and whether each is trained."""
    cuts, last = [], 0
    for begin, end in turn.trained:
        if begin > last:
            cuts.append((begin, False))
        cuts.append((end, True))
        last = end
    if last < len(turn.answer):
        cuts.append((len(turn.answer), False))
    return cuts


def _prefixes(turn: Turn) -> list[str]:
    """The prompt, and the prompt with each piece of the answer in turn."""
    return [turn.prompt, *(turn.prompt + turn.answer[:cut] for cut, _ in _cuts(turn))]


def _turn_row(turn: Turn, prefixes: list[list[int]], joiner: Joiner) -> IdRow:
    """``prefixes`` are the ids of ``_prefixes``."""
    ids = list(prefixes[0])
    trained = [False] * len(ids)
    straddles = start = 0
    for (cut, flag), joint in zip(_cuts(turn), prefixes[1:], strict=True):
        if joint[: len(ids)] == ids:
            piece = joint[len(ids) :]
        elif (own := joiner.continued(ids, turn.answer[start:cut], joint)) is not None:
            piece = own
        else:
            shared = next(
                (i for i, (a, b) in enumerate(zip(ids, joint, strict=False)) if a != b),
                min(len(ids), len(joint)),
            )
            ids, trained, piece = ids[:shared], trained[:shared], joint[shared:]
            straddles += 1
        ids += piece
        trained += [flag] * len(piece)
        start = cut
    return IdRow(ids, trained, (turn.index,), straddles)


def long_row(turns: Sequence[Turn], template: ChatTemplate, joiner: Joiner) -> IdRow | None:
    """``turn_rows`` of turns whose texts begin one with another, as one row, or None where that
    cannot be: each border is looked at from the last token before it that is split off first,
    rather than from the beginning."""
    text = turns[-1].text
    encoded = joiner.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids: list[int] = list(encoded.input_ids)
    ends = [end for _, end in encoded.offset_mapping]
    anchors = _anchors(text, template, encoded.offset_mapping)
    trained = [False] * len(ids)
    borders, starts = [], []
    for turn in turns:
        place, index = _before(anchors, len(turn.prompt))
        if len(turn.prompt) - place > 10 * _WINDOW:
            place = text.rfind("\n", 0, len(turn.prompt) - _WINDOW) + 1
            index = -1 if place else 0
        cuts = [len(turn.prompt) + cut for cut in (0, *(cut for cut, _ in _cuts(turn)))]
        borders.append((index, cuts))
        starts.append(place)
    pieces = [text[place:cut] for place, (_, cuts) in zip(starts, borders, strict=True)
              for cut in cuts]  # fmt: skip
    found = iter(joiner.ids(pieces))
    for turn, (index, cuts) in zip(turns, borders, strict=True):
        counts = [_agreed(next(found), ids, index, ends, cut) for cut in cuts]
        if None in counts:
            return None
        for (_, flag), begin, end in zip(_cuts(turn), counts, counts[1:], strict=False):
            assert begin is not None and end is not None
            trained[begin:end] = [flag] * (end - begin)
    row = IdRow(ids, trained, tuple(turn.index for turn in turns))
    return _with_tail(row, turns[-1], joiner)


def _agreed(piece: list[int], ids: list[int], index: int, ends: list[int], cut: int) -> int | None:
    """How many of ``ids`` stand before character ``cut``, if they end as ``piece`` does, which
    begins with token ``index`` (-1: somewhere). None if a token crosses the border."""
    if index >= 0:
        count = index + len(piece)
        return count if ids[index:count] == piece else None
    count = bisect_right(ends, cut)
    tail = piece[-_COMPARED:]
    return count if ids[max(0, count - len(tail)) : count] == tail else None


def _anchors(
    text: str, template: ChatTemplate, places: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The character and the token at which each token begins that is split off first."""
    starts = {
        start: index for index, (start, end) in reversed(list(enumerate(places))) if end > start
    }
    found = (match.start() for match in template.added.finditer(text))
    return [(0, 0), *((place, starts[place]) for place in found if place and place in starts)]


def _before(anchors: list[tuple[int, int]], place: int) -> tuple[int, int]:
    """The last of ``anchors`` before character ``place``."""
    return anchors[max(0, bisect_right(anchors, (place - 1, 1 << 60)) - 1)]
