"""BLEU and NIST, also of short and empty predictions, compared with sacrebleu and a plain formula."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import zip_longest

import pytest
import sacrebleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from lorakit.metrics.mteval import bleu, nist, tokenize
from tests.metrics.constructed import COUNT, blocks, instances

Group = list[str]


def by_sacrebleu(predictions: Group, references: list[Group]) -> float:
    columns = [list(column) for column in zip_longest(*references)]
    found = sacrebleu.corpus_bleu(predictions, columns, lowercase=True, tokenize="13a")
    return found.score / 100


def shouts_entity(text: str) -> bool:
    """sacrebleu lower-cases before decoding entities, mteval-v13a after: there they differ."""
    return re.search("&(QUOT|AMP|LT|GT);", text) is not None


@pytest.mark.parametrize("index", range(len(blocks())))
def test_bleu_equals_sacrebleu(index: int) -> None:
    predictions, references = (half[blocks()[index]] for half in instances())
    pairs = list(zip(predictions, references, strict=True))
    kept = [pair for pair in pairs if not any(map(shouts_entity, [pair[0], *pair[1]]))]
    assert len(kept) >= len(pairs) - 1
    ours, theirs = [prediction for prediction, _ in kept], [group for _, group in kept]
    assert min(len(tokenize(text)) for text in ours) < 4
    assert len({len(group) for group in theirs}) > 1
    expected = by_sacrebleu(ours, theirs)
    assert 0.4 < expected < 1
    assert bleu(ours, theirs) == pytest.approx(expected, abs=1e-9)


def test_enough_predictions_are_compared() -> None:
    predictions, _ = instances()
    assert blocks()[-1] == slice(0, COUNT)
    lengths = Counter(len(tokenize(text)) for text in predictions)
    assert min(lengths[n] for n in range(4)) >= 4, "of no, one, two and three tokens"
    assert len(predictions) - 1 >= 500


def words(text: str) -> list[str]:
    return Tokenizer13a()(text).lower().split()


def windows(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens)) if i + n <= len(tokens)]


def counted_nist(predictions: Group, references: list[Group]) -> float:
    """Return NIST as mteval-v13a counts it, match by match; equal ratios are added as fractions."""
    own = [words(text) for text in predictions]
    others = [[words(text) for text in group] for group in references]
    pooled = [tokens for group in others for tokens in group]
    total = 0.0
    for n in range(1, 6):
        whole = Counter(gram for tokens in pooled for gram in windows(tokens, n))
        start = Counter(gram for tokens in pooled for gram in windows(tokens, n - 1))
        gained: Counter[Fraction] = Counter()
        size = 0
        for tokens, group in zip(own, others, strict=True):
            room = {g: max(windows(r, n).count(g) for r in group) for g in windows(tokens, n)}
            for gram in windows(tokens, n):
                size += 1
                if room[gram] > 0:
                    room[gram] -= 1
                    gained[Fraction(start[gram[:-1]], whole[gram])] += 1
        total += math.fsum(math.log2(ratio) * hits for ratio, hits in gained.items()) / max(size, 1)
    mean = sum(Fraction(sum(map(len, group)), len(group)) for group in others)
    ratio = min(Fraction(1), sum(map(len, own)) / mean)
    return total * 0.5 ** ((math.log(ratio) / math.log(1.5)) ** 2)


@pytest.mark.parametrize("index", range(len(blocks())))
def test_nist_equals_a_plain_count(index: int) -> None:
    ours, theirs = (half[blocks()[index]] for half in instances())
    assert min(len(tokenize(text)) for text in ours) < 4
    assert nist(ours, theirs) == pytest.approx(counted_nist(ours, theirs), abs=1e-9)


def test_a_short_prediction_adds_no_candidates() -> None:
    """Computed by hand; k - n + 1 candidates of the single token would be 2 fewer 4-grams."""
    references = [["a b c d e"], ["x"]]
    assert bleu(["a b c d q", "x"], references) == pytest.approx(
        (5 / 6 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, abs=1e-12
    )
    assert bleu(["a b c d q", ""], references) == pytest.approx(
        math.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, abs=1e-12
    )
    single = 2 * math.log2(7) + 2 * math.log2(7 / 2)
    assert nist(["x", "a b c"], [["x"], ["a b c", "a b d"]]) == pytest.approx(
        single / 4 + (0 + 1) / 2 + 1 / 1, abs=1e-12
    )


def test_no_tokens() -> None:
    for score in (bleu, nist):
        assert score(["", " \n"], [["a pub"], ["a", "pub"]]) == 0
        assert score([""], [[""]]) == 0
    assert nist(["a pub"], [["", ""]]) == 0
    assert bleu(["a pub"], [["", ""]]) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It costs £3.50, i.e. 1,000.", "it costs £3.50 , i . e . 1,000 ."),
        ("20-25 family-friendly (A&amp;B)", "20 - 25 family-friendly ( a & b )"),
        ("&quot;x&quot; &lt;y&gt; it's", '" x " < y > it\'s'),
        ("end-\nof line\nnext <skipped>", "endof line next"),
        ("", ""),
    ],
)
def test_mteval_tokens(text: str, tokens: str) -> None:
    assert tokenize(text) == tokens.split()
