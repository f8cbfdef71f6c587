"""``rouge_l``: ROUGE-L with several references (Lin 2004), as coco-caption computes it."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.metrics.ptb import tokenize

#: Recall weighs beta^2 times what precision does.
_BETA = 1.2


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over predictions of (1 + beta^2) P R / (R + beta^2 P), 0-1.

    With L the length of the longest common subsequence of the Penn-Treebank tokens: P is the
    largest L / len(prediction) and R the largest L / len(reference) over the references, which
    need not be of the same one. ``references[i]`` are those of ``predictions[i]``, at least one.

    Source: pycocoevalcap/rouge of tuetschek/e2e-metrics. As there, a text without tokens has one,
    which is empty.
    """
    assert len(predictions) == len(references) > 0
    pairs = zip(predictions, references, strict=True)
    return sum(_score(prediction, texts) for prediction, texts in pairs) / len(predictions)


def _score(prediction: str, references: Sequence[str]) -> float:
    tokens = tokenize(prediction) or [""]
    others = [tokenize(text) or [""] for text in references]
    lengths = [_common_subsequence(tokens, other) for other in others]
    precision = max(lengths) / len(tokens)
    recall = max(length / len(other) for length, other in zip(lengths, others, strict=True))
    if not precision:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for j, other in enumerate(right, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]
