"""Entities of tagged words, and their scores, exactly as seqeval computes them by default.

Tags are ``O``, or ``B-TYPE`` for the first word of an entity and ``I-TYPE`` for its other words
(IOB2); ``E-TYPE`` (its last word) and ``S-TYPE`` (its only word) are read too. An ``I-`` or ``E-``
that continues no entity of its type begins one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

ENTITY_METRICS = ("f1", "precision", "recall", "accuracy")
_TAG = re.compile(r"O|[BIES](-.*)?", re.DOTALL)

Entity = tuple[str, int, int]


def is_entity_tag(tag: str) -> bool:
    """Whether the tag is ``O`` or that of a word of an entity."""
    return _TAG.fullmatch(tag) is not None


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """Yield the (type, first word, last word) of each entity in a row of ``tags``."""
    start, before, kind_before = 0, "O", ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, kind = tag[:1], tag[1:].split("-", 1)[-1] or "_"
        other = kind != kind_before
        if before != "O" and (before in "ES" or prefix in "BSO" or other):
            yield kind_before, start, index - 1
        if prefix != "O" and (prefix in "BS" or before in "ESO" or other):
            start = index
        before, kind_before = prefix, kind


def entity_scores(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str | None]]
) -> dict[str, float]:
    """Return the scores of the ``predicted`` tags of each row's words against ``gold``.

    ``precision`` is the fraction of the predicted entities that are right in type, first and last
    word, ``recall`` the fraction of the gold entities that were found, ``f1`` their harmonic mean,
    each over all rows together, and 0 where it is 0 / 0. ``accuracy`` is the fraction of words
    whose tag is right. None stands for a tag that ``gold`` cannot have: it is wrong, and no entity.
    """
    assert len(gold) == len(predicted)
    right = found = wanted = 0
    for tags, others in zip(gold, predicted, strict=True):
        own = {*entities(tags)}
        theirs = {*entities([tag or "O" for tag in others])}
        right += len(own & theirs)
        found += len(theirs)
        wanted += len(own)
    precision, recall = right / max(found, 1), right / max(wanted, 1)
    return {
        "f1": 2 * precision * recall / (precision + recall) if right else 0.0,
        "precision": precision,
        "recall": recall,
        "accuracy": tag_accuracy(gold, predicted),
    }


def tag_accuracy(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str | None]]) -> float:
    """Return the fraction of all rows' words whose tag is right."""
    pairs = [
        pair
        for tags, others in zip(gold, predicted, strict=True)
        for pair in zip(tags, others, strict=True)
    ]
    return sum(tag == other for tag, other in pairs) / max(len(pairs), 1)
