"""``cider``: CIDEr-D of a corpus (Vedantam et al. 2015), as coco-caption computes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.metrics.ptb import tokenize

_ORDER = 4
_SIGMA = 6.0  # in tokens

Ngram = tuple[str, ...]


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """10 * mean over predictions, their references and n = 1..4 of
    exp(-(l_c - l_r)^2 / (2 sigma^2)) * sum_g min(c_g, r_g) r_g / (|c| |r|); 0-10.

    c and r are the vectors of n-grams of a prediction and of a reference: count * (log N -
    log df), N predictions, df the number of those of which a reference holds the n-gram (at least
    1). Tokens are Penn Treebank's, without stemming. ``references[i]`` are those of
    ``predictions[i]``, at least one; one prediction alone scores 0, since log N = 0.

    Source: pycocoevalcap/cider of tuetschek/e2e-metrics. As there, the lengths l_c and l_r are
    counted in bigrams.
    """
    assert len(predictions) == len(references) > 0
    candidates = [_counts(prediction) for prediction in predictions]
    groups = [[_counts(text) for text in texts] for texts in references]
    frequency: Counter[Ngram] = Counter()
    for group in groups:
        frequency.update(set().union(*group))
    idf = _Idf(math.log(len(predictions)), frequency)
    total = 0.0
    for candidate, group in zip(candidates, groups, strict=True):
        vector = idf.vector(candidate)
        scores = [_similarity(vector, idf.vector(reference)) for reference in group]
        total += sum(scores) / len(scores)
    return 10 * total / len(predictions)


def _counts(text: str) -> Counter[Ngram]:
    tokens = " ".join(tokenize(text)).split()  # which also parts at U+00A0
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, _ORDER + 1) for i in range(len(tokens) - n + 1)
    )


@dataclass(frozen=True)
class _Vector:
    weights: dict[Ngram, float]
    norms: list[float]  # by n
    length: int  # in bigrams


@dataclass(frozen=True)
class _Idf:
    log_count: float
    frequency: Counter[Ngram]

    def vector(self, counts: Counter[Ngram]) -> _Vector:
        weights = {
            ngram: count * (self.log_count - math.log(max(1, self.frequency[ngram])))
            for ngram, count in counts.items()
        }
        squares = [0.0] * _ORDER
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        length = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return _Vector(weights, [math.sqrt(square) for square in squares], length)


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    products = [0.0] * _ORDER
    for ngram, weight in candidate.weights.items():
        other = reference.weights.get(ngram, 0.0)
        products[len(ngram) - 1] += min(weight, other) * other
    cosines = [
        product / (a * b) if a and b else 0.0
        for product, a, b in zip(products, candidate.norms, reference.norms, strict=True)
    ]
    penalty = math.exp(-((candidate.length - reference.length) ** 2) / (2 * _SIGMA**2))
    return penalty * sum(cosines) / _ORDER
