"""Texts one behind another -> tokens of which none crosses a border between two texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

#: Texts behind which a tokenizer continues, rather than begins, a text.
_ANCHORS = ("\n", "a", ".")
#: Headers and ends of turns come again and again: the ids of texts of so few characters are kept.
_SHORT, _MOST_KEPT = 80, 10_000


@dataclass
class Joiner:
    """Tokenises without special tokens of its own, which the texts hold where they are wanted."""

    tokenizer: Any
    _anchors: list[tuple[str, list[int]]] = field(default_factory=list)
    _short: dict[str, list[int]] = field(default_factory=dict)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text by itself."""
        known = self._short
        asked = [text for text in texts if text not in known]
        if not asked:
            return [list(known[text]) for text in texts]
        found = self.tokenizer(asked, add_special_tokens=False, verbose=False).input_ids
        made = dict(zip(asked, found, strict=True))
        if len(known) < _MOST_KEPT:
            known.update((text, ids) for text, ids in made.items() if len(text) <= _SHORT)
        return [list(made[text] if text in made else known[text]) for text in texts]

    def continued(self, before: Sequence[int], text: str, joint: Sequence[int]) -> list[int] | None:
        """Ids of ``text`` that stand behind the ids ``before`` and read as ``joint`` reads, the
        ids of both texts in one. None if the tokenizer has none: it would write a space there."""
        (plain,) = self.ids([text])
        wanted = self._decoded(joint)
        for candidate in (plain, *self._anchored(text)):
            if self._decoded([*before, *candidate]) == wanted:
                return candidate
        return None

    def inside(self, text: str) -> list[int]:
        """The ids of a text that others precede, without the space with which a tokenizer may
        begin a text."""
        (plain,) = self.ids([text])
        if self.adds_space:
            for anchor, anchor_ids in self._known_anchors():
                (both,) = self.ids([anchor + text])
                wanted = self._decoded(anchor_ids) + text
                if self._behind(anchor_ids, both) and self._decoded(both) == wanted:
                    return both[len(anchor_ids) :]
        return plain

    @cached_property
    def adds_space(self) -> bool:
        """Whether the tokenizer puts a space before a text that begins without one."""
        (alone, anchor, both) = self.ids(["a", "\n", "\na"])
        return both != [*anchor, *alone]

    def _anchored(self, text: str) -> list[list[int]]:
        anchors = self._known_anchors()
        found = self.ids([anchor + text for anchor, _ in anchors])
        return [
            both[len(ids) :]
            for (_, ids), both in zip(anchors, found, strict=True)
            if self._behind(ids, both)
        ]

    def _known_anchors(self) -> list[tuple[str, list[int]]]:
        if not self._anchors:
            special = [token for token in (self.tokenizer.eos_token,) if token]
            names = [*special, *_ANCHORS]
            self._anchors = list(zip(names, self.ids(names), strict=True))
        return self._anchors

    @staticmethod
    def _behind(anchor: Sequence[int], both: Sequence[int]) -> bool:
        return list(both[: len(anchor)]) == list(anchor)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
