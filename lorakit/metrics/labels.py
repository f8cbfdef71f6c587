"""GLUE's metrics for class indices and numbers, computed by scikit-learn and SciPy.

A score that is undefined because all predictions or labels are equal (a correlation's 0 / 0) is 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from lorakit.errors import UserError

Numbers = Sequence[int | float]

_LIBRARIES = {
    "f1": ("sklearn", "scikit-learn"),
    "matthews_correlation": ("sklearn", "scikit-learn"),
    "pearson": ("scipy", "scipy"),
    "spearmanr": ("scipy", "scipy"),
}


def require_metrics(names: Sequence[str]) -> None:
    """Raise UserError if a library that a metric needs is not installed."""
    for name in names:
        module, package = _LIBRARIES.get(name, (None, None))
        if module is not None and find_spec(module) is None:
            raise UserError(
                f"the metric {name} needs {package}, which is not installed: "
                'pip install "lorakit[eval]"'
            )


def label_score(name: str, gold: Numbers, predicted: Numbers, classes: int) -> float:
    """The metric ``name`` of ``LABEL_METRICS``; ``classes`` is the number of classes, 0 for
    regression."""
    assert len(gold) == len(predicted) > 0
    with warnings.catch_warnings():  # about the undefined scores above
        warnings.simplefilter("ignore")
        return _SCORES[name](gold, predicted, classes)


def _accuracy(gold: Numbers, predicted: Numbers, classes: int) -> float:
    return sum(a == b for a, b in zip(gold, predicted, strict=True)) / len(gold)


def _f1(gold: Numbers, predicted: Numbers, classes: int) -> float:
    """2 TP / (2 TP + FP + FN): with two classes, that of class 1; with more, the unweighted mean
    over the classes (macro). A class for which all three are 0 scores 0."""
    from sklearn.metrics import f1_score

    scored = [1] if classes == 2 else list(range(classes))  # a prediction may be NO_CLASS
    return float(f1_score(gold, predicted, labels=scored, average="macro", zero_division=0))


def _matthews_correlation(gold: Numbers, predicted: Numbers, classes: int) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(gold, predicted))


def _pearson(gold: Numbers, predicted: Numbers, classes: int) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, gold, predicted)


def _spearmanr(gold: Numbers, predicted: Numbers, classes: int) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, gold, predicted)


def _correlation(function: Callable[..., Any], gold: Numbers, predicted: Numbers) -> float:
    if len(set(gold)) < 2 or len(set(predicted)) < 2:
        return 0.0
    value = float(function(gold, predicted)[0])
    return value if math.isfinite(value) else 0.0


_SCORES: dict[str, Callable[[Numbers, Numbers, int], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews_correlation,
    "pearson": _pearson,
    "spearmanr": _spearmanr,
}
LABEL_METRICS = tuple(_SCORES)
