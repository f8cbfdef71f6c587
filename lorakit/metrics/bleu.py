"""``bleu``: BLEU-4 of a corpus with several references (Papineni et al. 2002), as mteval-v13a."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorakit.metrics.mteval import hits, tokenize

_ORDER = 4


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BP * exp(mean over n = 1..4 of log(hits_n / candidates_n)), of the whole corpus, 0-1.

    Upper and lower case are equal. BP = min(1, exp(1 - r / c)) with c the predictions' length in
    tokens and r the sum, over predictions, of the length of the reference that is closest (of two
    the shorter). A prediction of k tokens has max(0, k - n + 1) candidates. Predictions without
    any token score 0. ``references[i]`` are those of ``predictions[i]``, at least one.

    Source: mteval-v13a and, of more digits, sacrebleu; and pymteval of tuetschek/e2e-metrics, by
    which the LoRA paper scores. Where the whole corpus has no hit of an n, the first two smooth or
    give 0; here as in pymteval 0 hits count 1e-15 and 0 candidates 1e-9. Where a prediction has
    k < n tokens, pymteval differs: it adds k - n + 1 candidates, at times a negative number, so
    that short predictions raise the score, and an empty prediction is one token to it. There
    mteval-v13a is followed, which pymteval means to equal.
    """
    assert len(predictions) == len(references) > 0
    found, candidates = [0] * _ORDER, [0] * _ORDER
    closest = 0
    for prediction, texts in zip(predictions, references, strict=True):
        tokens, others = tokenize(prediction), [tokenize(text) for text in texts]
        closest += min((abs(len(other) - len(tokens)), len(other)) for other in others)[1]
        for n in range(_ORDER):
            found[n] += hits(tokens, others, n + 1).total()
            candidates[n] += max(0, len(tokens) - n)
    if candidates[0] == 0:
        return 0.0
    logs = [
        math.log(max(hit, 1e-15) / max(total, 1e-9))
        for hit, total in zip(found, candidates, strict=True)
    ]
    brevity = min(0.0, 1 - closest / candidates[0])
    return math.exp(brevity + sum(logs) / _ORDER)
