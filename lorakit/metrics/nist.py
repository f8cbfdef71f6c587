"""``nist``: NIST-5 of a corpus with several references (Doddington 2002), as mteval-v13a."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from lorakit.metrics.mteval import Ngram, hits, ngrams, tokenize

_ORDER = 5
#: Makes the brevity factor 1/2 where the predictions have 2/3 of the references' length.
_BETA = math.log(2) / math.log(1.5) ** 2


def nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """exp(-beta * log(min(1, c / r))^2) * sum over n = 1..5 of info(hits_n) / candidates_n, of
    the whole corpus; at least 0, without an upper bound.

    info(w1..wn) = log2(count(w1..wn-1) / count(w1..wn)), counted over all references; the empty
    n-gram counts as often as there are tokens. c is the predictions' length in tokens, r the sum
    of the mean lengths of each one's references. Upper and lower case are equal. A prediction of
    k tokens has max(0, k - n + 1) candidates; an n without any counts 0. Without a hit NIST is 0.
    ``references[i]`` are those of ``predictions[i]``, at least one.

    Source: pymteval of tuetschek/e2e-metrics, by which the LoRA paper scores. Where a prediction
    has k < n tokens, it differs: it adds k - n + 1 candidates, at times a negative number, so that
    short predictions raise the score, and an empty prediction is one token to it. There
    mteval-v13a is followed, which pymteval means to equal.
    """
    assert len(predictions) == len(references) > 0
    counts: Counter[Ngram] = Counter()
    found: list[Counter[Ngram]] = [Counter() for _ in range(_ORDER)]
    candidates = [0] * _ORDER
    length = 0.0
    for prediction, texts in zip(predictions, references, strict=True):
        tokens, others = tokenize(prediction), [tokenize(text) for text in texts]
        for n in range(_ORDER):
            found[n].update(hits(tokens, others, n + 1))
            candidates[n] += max(0, len(tokens) - n)
            for other in others:
                counts.update(ngrams(other, n + 1))
        total = sum(map(len, others))
        counts[()] += total
        length += total / len(others)
    if not found[0]:
        return 0.0
    information = sum(
        sum(_information(ngram, counts) * hit for ngram, hit in found[n].items()) / candidates[n]
        for n in range(_ORDER)
        if candidates[n] > 0
    )
    return math.exp(-_BETA * math.log(min(1.0, candidates[0] / length)) ** 2) * information


def _information(ngram: Ngram, counts: Counter[Ngram]) -> float:
    return math.log2(counts[ngram[:-1]] / counts[ngram])
