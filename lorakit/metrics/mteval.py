"""Tokens as mteval-v13a has them, for BLEU and NIST; and the n-grams of tokens.

``bleu``: BLEU-4 of a corpus with several references (Papineni et al. 2002), as mteval-v13a.

``nist``: NIST-5 of a corpus with several references (Doddington 2002), as mteval-v13a.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

Ngram = tuple[str, ...]

#: In order. First what is undone (an end-of-line hyphen, the four entities), then what is split.
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<skipped>|-\n", ""),
        (r"&quot;", '"'),
        (r"&amp;", "&"),
        (r"&lt;", "<"),
        (r"&gt;", ">"),
        (r"([!-&(-+/:-@\[-`{-~])", r" \1 "),  # ASCII punctuation but ' , - .
        (r"([^0-9])([.,])", r"\1 \2 "),
        (r"([.,])([^0-9])", r" \1 \2"),
        (r"([0-9])(-)", r"\1 \2 "),
    )
)


def tokenize(text: str) -> list[str]:
    """Lower-cased tokens of ``text`` (mteval-v13a, NormalizeText without its international
    mode): ASCII punctuation stands alone, ``.`` and ``,`` unless between digits, ``-`` only after
    a digit."""
    text = f" {text} "
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return [token.lower() for token in text.split()]


def ngrams(tokens: Sequence[str], n: int) -> Counter[Ngram]:
    """How often each n-gram occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def hits(candidate: Sequence[str], references: Sequence[Sequence[str]], n: int) -> Counter[Ngram]:
    """The candidate's n-grams that a reference has, each at most as often as in the reference
    that has it most often."""
    allowed: Counter[Ngram] = Counter()
    for reference in references:
        allowed |= ngrams(reference, n)
    return ngrams(candidate, n) & allowed


_BLEU_ORDER = 4


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
    found, candidates = [0] * _BLEU_ORDER, [0] * _BLEU_ORDER
    closest = 0
    for prediction, texts in zip(predictions, references, strict=True):
        tokens, others = tokenize(prediction), [tokenize(text) for text in texts]
        closest += min((abs(len(other) - len(tokens)), len(other)) for other in others)[1]
        for n in range(_BLEU_ORDER):
            found[n] += hits(tokens, others, n + 1).total()
            candidates[n] += max(0, len(tokens) - n)
    if candidates[0] == 0:
        return 0.0
    logs = [
        math.log(max(hit, 1e-15) / max(total, 1e-9))
        for hit, total in zip(found, candidates, strict=True)
    ]
    brevity = min(0.0, 1 - closest / candidates[0])
    return math.exp(brevity + sum(logs) / _BLEU_ORDER)


_NIST_ORDER = 5
#: Makes the brevity factor 1/2 where the predictions have 2/3 of the references' length.
_NIST_BETA = math.log(2) / math.log(1.5) ** 2


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
    found: list[Counter[Ngram]] = [Counter() for _ in range(_NIST_ORDER)]
    candidates = [0] * _NIST_ORDER
    length = 0.0
    for prediction, texts in zip(predictions, references, strict=True):
        tokens, others = tokenize(prediction), [tokenize(text) for text in texts]
        for n in range(_NIST_ORDER):
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
        for n in range(_NIST_ORDER)
        if candidates[n] > 0
    )
    return math.exp(-_NIST_BETA * math.log(min(1.0, candidates[0] / length)) ** 2) * information


def _information(ngram: Ngram, counts: Counter[Ngram]) -> float:
    return math.log2(counts[ngram[:-1]] / counts[ngram])
