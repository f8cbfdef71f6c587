"""``exact_match``: the share of predictions that are the reference."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of the pairs that are equal text once white space at both ends is stripped; 0-1.

    ``references`` holds one text a prediction, and there is at least one.
    """
    assert len(predictions) == len(references) > 0
    pairs = zip(predictions, references, strict=True)
    return sum(a.strip() == b.strip() for a, b in pairs) / len(predictions)
