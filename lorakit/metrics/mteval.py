"""Tokens as mteval-v13a has them, for BLEU and NIST; and the n-grams of tokens."""

from __future__ import annotations

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
