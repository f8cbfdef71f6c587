"""Metrics of rows that have several labels each."""

from __future__ import annotations

from collections.abc import Sequence

MULTI_LABEL_METRICS = ("f1_micro", "f1_macro", "subset_accuracy")


def multi_label_scores(
    gold: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Return the scores of ``predicted`` (rows, classes) against ``gold``, both of 0 and 1.

    F1 is 2 TP / (2 TP + FP + FN), or 0 if all three are 0: ``f1_micro`` of the counts of all
    classes together, ``f1_macro`` the unweighted mean over the classes. ``subset_accuracy`` is the
    fraction of rows in which every class is right.
    """
    assert len(gold) == len(predicted) > 0
    right, marked = [0] * len(gold[0]), [0] * len(gold[0])
    for own, other in zip(gold, predicted, strict=True):
        for index, (a, b) in enumerate(zip(own, other, strict=True)):
            right[index] += a & b
            marked[index] += a + b  # in total 2 TP + FP + FN
    by_class = [2 * r / m if m else 0.0 for r, m in zip(right, marked, strict=True)]
    pairs = zip(gold, predicted, strict=True)
    return {
        "f1_micro": 2 * sum(right) / max(sum(marked), 1),
        "f1_macro": sum(by_class) / len(by_class),
        "subset_accuracy": sum(tuple(a) == tuple(b) for a, b in pairs) / len(gold),
    }
