"""Divide numbers of rows in proportion to weights, without rounding the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction


def exact(weight: float) -> Fraction:
    """The weight as it is written in decimal: 0.1 is one tenth."""
    return Fraction(repr(weight))


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide ``total`` in proportion to ``weights`` by largest remainder: each part is
    total * weight / sum of the weights, rounded down or up."""
    fractions = [exact(weight) for weight in weights]
    whole = sum(fractions)
    quotas = [total * weight / whole for weight in fractions]
    parts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(parts)), key=lambda index: parts[index] - quotas[index])
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


def interleaved(weights: Sequence[float]) -> Iterator[int]:
    """Yield indices endlessly, each in proportion to its weight and as evenly as possible: the next
    index is always that of which most are due."""
    fractions = [exact(weight) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in fractions))
    shares = [int(weight * scale) for weight in fractions]
    total, due = sum(shares), [0] * len(shares)
    while True:
        due = [credit + share for credit, share in zip(due, shares, strict=True)]
        index = max(range(len(due)), key=due.__getitem__)
        due[index] -= total
        yield index
