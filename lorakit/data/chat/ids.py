"""Tokenize turns into rows of ids in which no token crosses the boundary between two texts.

A prompt has the same ids as when it is tokenized alone for generation.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lorakit.data.chat.template import ChatTemplate, Span
from lorakit.data.chat.turns import Turn
from lorakit.data.text_ids import TextTokenizer

#: Text that follows one of these is tokenized as a continuation.
_ANCHORS = ("\n", "a", ".")
#: Headers and ends of turns recur, so the ids of texts up to this many characters are cached.
_MAX_CACHED_LENGTH, _MAX_CACHED = 80, 10_000
#: If no added token is within ``_FAR`` characters before a boundary, this many characters before it
#: are tokenized again.
_WINDOW, _FAR = 400, 4000
#: How many tokens must then be equal.
_COMPARED = 8


@dataclass
class Joiner:
    """Tokenizes texts without adding special tokens, since the texts already contain them."""

    tokenizer: Any
    _anchors: list[tuple[str, list[int]]] = field(default_factory=list)
    _short: dict[str, list[int]] = field(default_factory=dict)

    @cached_property
    def tokenize(self) -> TextTokenizer:
        """Tokenizes each of many texts alone."""
        return TextTokenizer(self.tokenizer)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize each text alone."""
        known = self._short
        asked = [text for text in texts if text not in known]
        if not asked:
            return [list(known[text]) for text in texts]
        found = self.tokenize(asked)
        made = {text: ids.tolist() for text, ids in zip(asked, found, strict=True)}
        if len(known) < _MAX_CACHED:
            known.update(
                (text, ids) for text, ids in made.items() if len(text) <= _MAX_CACHED_LENGTH
            )
        return [list(made[text] if text in made else known[text]) for text in texts]

    def encoded(self, text: str) -> Any:
        """The text's ``input_ids``, and where each of them is in it: ``offset_mapping``."""
        return self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )

    def continued(self, before: Sequence[int], text: str, joint: Sequence[int]) -> list[int] | None:
        """Return ids of ``text`` that, appended to the ids ``before``, decode like ``joint``, the
        ids of both texts tokenized together. None if the tokenizer would always insert a space."""
        (plain,) = self.ids([text])
        wanted = self._decoded(joint)
        for candidate in (plain, *self._anchored(text)):
            if self._decoded([*before, *candidate]) == wanted:
                return candidate
        return None

    def inside(self, text: str) -> list[int]:
        """Tokenize a text that follows another, without the leading space that some tokenizers add
        to a text."""
        (plain,) = self.ids([text])
        if self.adds_space:
            for anchor, anchor_ids in self._known_anchors():
                (both,) = self.ids([anchor + text])
                wanted = self._decoded(anchor_ids) + text
                if self._follows(anchor_ids, both) and self._decoded(both) == wanted:
                    return both[len(anchor_ids) :]
        return plain

    @cached_property
    def adds_space(self) -> bool:
        """Whether the tokenizer adds a leading space to a text."""
        (alone, anchor, both) = self.ids(["a", "\n", "\na"])
        return both != [*anchor, *alone]

    def _anchored(self, text: str) -> list[list[int]]:
        anchors = self._known_anchors()
        found = self.ids([anchor + text for anchor, _ in anchors])
        return [
            both[len(ids) :]
            for (_, ids), both in zip(anchors, found, strict=True)
            if self._follows(ids, both)
        ]

    def _known_anchors(self) -> list[tuple[str, list[int]]]:
        if not self._anchors:
            special = [token for token in (self.tokenizer.eos_token,) if token]
            names = [*special, *_ANCHORS]
            self._anchors = list(zip(names, self.ids(names), strict=True))
        return self._anchors

    @staticmethod
    def _follows(anchor: Sequence[int], both: Sequence[int]) -> bool:
        return list(both[: len(anchor)]) == list(anchor)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


@dataclass(frozen=True)
class IdRow:
    """A row of token ids. ``loss_weights`` are their weights in the loss, 0 for those that do not
    count in it. ``turns`` are the indices of the trained messages, ``straddles`` is the number of
    answers that begin within the last token of the prompt."""

    input_ids: list[int]
    loss_weights: list[float]
    turns: tuple[int, ...]
    straddles: int = 0

    @property
    def loss_mask(self) -> list[bool]:
        """Which ids count in the loss."""
        return [weight > 0 for weight in self.loss_weights]

    @property
    def prompt(self) -> int:
        """The number of ids before the first trained one."""
        trained = (index for index, weight in enumerate(self.loss_weights) if weight)
        return next(trained, len(self.input_ids))


def turn_rows(turns: Sequence[Turn], joiner: Joiner) -> list[IdRow]:
    """Return as few rows as possible such that each turn is trained in one of them. A row contains
    the turns whose ids (prompt and answer) are a prefix of those of its last turn."""
    texts = [text for turn in turns for text in _prefixes(turn)]
    found = iter(joiner.ids(texts))
    left = [
        (turn, _turn_row(turn, [next(found) for _ in _prefixes(turn)], joiner)) for turn in turns
    ]
    rows = []
    while left:
        last, longest = left[-1]
        within = [
            row for _, row in left if longest.input_ids[: len(row.input_ids)] == row.input_ids
        ]
        rows.append(_with_tail(_joined(within), last, joiner))
        taken = {turn for row in within for turn in row.turns}
        left = [(turn, row) for turn, row in left if turn.index not in taken]
    return rows[::-1]


def _joined(rows: Sequence[IdRow]) -> IdRow:
    """Return the last row, of which all others are prefixes, trained wherever any of them is."""
    weights = [0.0] * len(rows[-1].input_ids)
    for row in rows:
        begin = row.prompt
        weights[begin : len(row.input_ids)] = row.loss_weights[begin:]
    turns = tuple(turn for row in rows for turn in row.turns)
    return IdRow(rows[-1].input_ids, weights, turns, sum(row.straddles for row in rows))


def _with_tail(row: IdRow, turn: Turn, joiner: Joiner) -> IdRow:
    tail = joiner.inside(turn.tail) if turn.tail else []
    weights = [*row.loss_weights, *(0.0 for _ in tail)]
    return IdRow([*row.input_ids, *tail], weights, row.turns, row.straddles)


def _cuts(turn: Turn) -> list[tuple[int, bool]]:
    """The end of each piece of the answer, and whether the piece is trained."""
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
    """Build the row of one turn. ``prefixes`` are the ids of ``_prefixes``."""
    ids = list(prefixes[0])
    weights = [0.0] * len(ids)
    straddles = start = 0
    for (cut, flag), joint in zip(_cuts(turn), prefixes[1:], strict=True):
        if joint[: len(ids)] == ids:
            piece = joint[len(ids) :]
        elif (rest := joiner.continued(ids, turn.answer[start:cut], joint)) is not None:
            piece = rest
        else:
            shared = next(
                (i for i, (a, b) in enumerate(zip(ids, joint, strict=False)) if a != b),
                min(len(ids), len(joint)),
            )
            ids, weights, piece = ids[:shared], weights[:shared], joint[shared:]
            straddles += 1
        ids += piece
        weights += [flag * turn.weight] * len(piece)
        start = cut
    if turn.masked:
        places = joiner.encoded(turn.text).offset_mapping
        # The ids differ from those of the whole text at most where the answer begins.
        _mask(weights, turn, places, len(ids) - len(places))
    return IdRow(ids, weights, (turn.index,), straddles)


def joint_row(turns: Sequence[Turn], template: ChatTemplate, joiner: Joiner) -> IdRow | None:
    """Like ``turn_rows``, but a single row for turns whose texts are prefixes of each other; None
    if that is impossible. The text is tokenized once, and each boundary is checked from the last
    added token before it rather than from the beginning."""
    text = turns[-1].text
    encoded = joiner.encoded(text)
    ids: list[int] = list(encoded.input_ids)
    boundaries = _Boundaries(text, ids, encoded.offset_mapping, template, joiner)
    weights = [0.0] * len(ids)
    for turn in turns:
        begin = len(turn.prompt)
        cuts = _cuts(turn)
        counts = boundaries.counts(begin, [begin, *(begin + cut for cut, _ in cuts)])
        if counts is None:
            return None
        for (_, flag), first, last in zip(cuts, counts, counts[1:], strict=False):
            weights[first:last] = [flag * turn.weight] * (last - first)
        _mask(weights, turn, encoded.offset_mapping)
    row = IdRow(ids, weights, tuple(turn.index for turn in turns))
    return _with_tail(row, turns[-1], joiner)


def _mask(weights: list[float], turn: Turn, places: Sequence[Span], shift: int = 0) -> None:
    """Set the weights of tokens within ``turn.masked`` to 0. ``places`` are those of tokens in a
    text that begins with the turn's; their weights are ``shift`` further on."""
    start = len(turn.prompt)
    for begin, end in turn.masked:
        index = bisect_left(places, (start + begin,))
        while index < len(places) and places[index][1] <= start + end:
            weights[index + shift] = 0.0
            index += 1


class _Boundaries:
    """Counts the tokens of a text before a character. A tokenizer splits off its added tokens
    first, so the text on either side of one is tokenized independently."""

    def __init__(
        self,
        text: str,
        ids: list[int],
        places: Sequence[tuple[int, int]],
        template: ChatTemplate,
        joiner: Joiner,
    ) -> None:
        self._text, self._ids, self._joiner = text, ids, joiner
        self._ends = [end for _, end in places]
        starts = {start: i for i, (start, end) in enumerate(places) if end > start}
        found = [match.span() for match in template.added.finditer(text) if match.start() in starts]
        #: The start of each added token with its number, and the ends of added tokens.
        self._firsts = [(begin, starts[begin]) for begin, _ in found]
        self._stops = {end: starts[begin] + 1 for begin, end in found}

    def counts(self, begin: int, cuts: Sequence[int]) -> list[int] | None:
        """The number of tokens before each of ``cuts``, the first of which is ``begin``. None if a
        token crosses one of them."""
        place, index = self._before(begin)
        open_cuts = [cut for cut in cuts if cut not in self._stops]
        pieces = self._joiner.ids([self._text[place:cut] for cut in open_cuts])
        agreed = {
            cut: self._agreed(piece, index, cut)
            for cut, piece in zip(open_cuts, pieces, strict=True)
        }
        counts = [self._stops.get(cut) or agreed[cut] for cut in cuts]
        return None if None in counts else [count for count in counts if count is not None]

    def _before(self, begin: int) -> tuple[int, int]:
        """Where to start checking: a character, and the index of its token or -1 if unknown."""
        number = bisect_right(self._firsts, (begin - 1, len(self._ids)))
        place, index = self._firsts[number - 1] if number else (0, 0)
        if begin - place <= _FAR:
            return place, index
        place = self._text.rfind("\n", 0, begin - _WINDOW) + 1
        return place, -1 if place else 0

    def _agreed(self, piece: list[int], index: int, cut: int) -> int | None:
        """The number of tokens before ``cut`` if they end like ``piece``, else None."""
        if index >= 0:
            count = index + len(piece)
            return count if self._ids[index:count] == piece else None
        count = bisect_right(self._ends, cut)
        tail = piece[-_COMPARED:]
        return count if self._ids[max(0, count - len(tail)) : count] == tail else None
