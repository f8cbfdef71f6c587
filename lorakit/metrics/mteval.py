"""``bleu`` and ``nist`` of a corpus with several references, as in mteval-v13a."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

Ngram = tuple[str, ...]

_BLEU_ORDER = 4
_NIST_ORDER = 5
#: With this, NIST's brevity factor is 1/2 if predictions are 2/3 as long as the references.
_NIST_BETA = math.log(2) / math.log(1.5) ** 2
#: Applied in order: some text is unescaped (an end-of-line hyphen, four entities), then split.
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<skipped>|-\n", ""),
        (r"&quot;", '"'),
        (r"&amp;", "&"),
        (r"&lt;", "<"),
        (r"&gt;", ">"),
        (r"([!-&(-+/:-@\[-`{-~])", r" \1 "),  # ASCII punctuation except ' , - .
        (r"([^0-9])([.,])", r"\1 \2 "),
        (r"([.,])([^0-9])", r" \1 \2"),
        (r"([0-9])(-)", r"\1 \2 "),
    )
)


def tokenize(text: str) -> list[str]:
    """Lower-cased tokens of ``text`` (mteval-v13a, NormalizeText without its international mode):
    ASCII punctuation is separate, ``.`` and ``,`` except between digits, ``-`` only after a
    digit."""
    text = f" {text} "
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return [token.lower() for token in text.split()]


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 (Papineni et al. 2002) of the whole corpus, ignoring case; 0 to 1:
    BP * exp(mean over n = 1..4 of log(hits_n / candidates_n)).

    BP = min(1, exp(1 - r / c)), with c the predictions' length in tokens and r the sum, over
    predictions, of the length of the closest reference (of two the shorter). A prediction of k
    tokens has max(0, k - n + 1) candidates. Predictions without any token score 0.
    ``references[i]`` are those of ``predictions[i]``, at least one.

    Source: mteval-v13a; sacrebleu, for more digits; and pymteval of tuetschek/e2e-metrics, which
    the LoRA paper uses. If the whole corpus has no hit for an n, the first two smooth or return 0;
    here, as in pymteval, 0 hits count 1e-15 and 0 candidates 1e-9. For a prediction of k < n tokens
    pymteval deviates: it adds k - n + 1 candidates, possibly a negative number, so that short
    predictions raise the score, and counts an empty prediction as one token. This function follows
    mteval-v13a there, which pymteval is meant to equal.
    """
    assert len(predictions) == len(references) > 0
    found, candidates = [0] * _BLEU_ORDER, [0] * _BLEU_ORDER
    closest = 0
    for prediction, texts in zip(predictions, references, strict=True):
        tokens, others = tokenize(prediction), [tokenize(text) for text in texts]
        closest += min((abs(len(other) - len(tokens)), len(other)) for other in others)[1]
        for n in range(_BLEU_ORDER):
            found[n] += _hits(tokens, others, n + 1).total()
            candidates[n] += max(0, len(tokens) - n)
    if candidates[0] == 0:
        return 0.0
    logs = [
        math.log(max(hit, 1e-15) / max(total, 1e-9))
        for hit, total in zip(found, candidates, strict=True)
    ]
    brevity = min(0.0, 1 - closest / candidates[0])
    return math.exp(brevity + sum(logs) / _BLEU_ORDER)


def nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """NIST-5 (Doddington 2002) of the whole corpus, ignoring case; at least 0, without an upper
    bound: exp(-beta * log(min(1, c / r))^2) * sum over n = 1..5 of info(hits_n) / candidates_n.

    info(w1..wn) = log2(count(w1..wn-1) / count(w1..wn)), counted over all references; the empty
    n-gram counts as often as there are tokens. c is the predictions' length in tokens, r the sum
    of the mean lengths of each one's references. A prediction of k tokens has max(0, k - n + 1)
    candidates; an n without any counts 0. Without a hit the score is 0. ``references[i]`` are those
    of ``predictions[i]``, at least one.

    Source: pymteval of tuetschek/e2e-metrics, which the LoRA paper uses. For a prediction of k < n
    tokens it deviates as it does for ``bleu``, and this function follows mteval-v13a.
    """
    assert len(predictions) == len(references) > 0
    counts: Counter[Ngram] = Counter()
    found: list[Counter[Ngram]] = [Counter() for _ in range(_NIST_ORDER)]
    candidates = [0] * _NIST_ORDER
    length = 0.0
    for prediction, texts in zip(predictions, references, strict=True):
        tokens, others = tokenize(prediction), [tokenize(text) for text in texts]
        for n in range(_NIST_ORDER):
            found[n].update(_hits(tokens, others, n + 1))
            candidates[n] += max(0, len(tokens) - n)
            for other in others:
                counts.update(_ngrams(other, n + 1))
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


def _ngrams(tokens: Sequence[str], n: int) -> Counter[Ngram]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _hits(candidate: Sequence[str], references: Sequence[Sequence[str]], n: int) -> Counter[Ngram]:
    """The candidate's n-grams that occur in a reference, each clipped to its largest count in any
    reference."""
    allowed: Counter[Ngram] = Counter()
    for reference in references:
        allowed |= _ngrams(reference, n)
    return _ngrams(candidate, n) & allowed
