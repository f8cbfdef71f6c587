"""Classification and regression scores compared with NumPy formulas, on 600 predictions each."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit.errors import UserError
from lorakit.metrics import labels
from lorakit.metrics.labels import LABEL_METRICS, label_score, require_metrics
from lorakit.tasks.base import exact_match

COUNT = 600
Array = NDArray[np.float64]


def classes_of(count: int, seed: int, right: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    draw = np.random.default_rng(seed)
    gold = draw.choice(count, COUNT, p=draw.dirichlet(np.ones(count)))
    other = draw.integers(0, count, COUNT)
    return gold, np.where(draw.random(COUNT) < right, gold, other)


def score(name: str, gold: NDArray[np.generic], predicted: NDArray[np.generic], n: int) -> float:
    return label_score(name, gold.tolist(), predicted.tolist(), n)


def f1_of(gold: NDArray[np.int64], predicted: NDArray[np.int64], label: int) -> float:
    hits = int(((gold == label) & (predicted == label)).sum())
    total = int((gold == label).sum() + (predicted == label).sum())
    return 2 * hits / total if total else 0.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("right", [0.0, 0.5, 0.9, 1.0])
def test_two_classes(seed: int, right: float) -> None:
    gold, predicted = classes_of(2, seed, right)
    assert score("accuracy", gold, predicted, 2) == pytest.approx(
        float(np.mean(gold == predicted)), abs=1e-9
    )
    assert score("f1", gold, predicted, 2) == pytest.approx(f1_of(gold, predicted, 1), abs=1e-9)
    table = np.array([[np.sum((gold == g) & (predicted == p)) for p in (0, 1)] for g in (0, 1)])
    (tn, fp), (fn, tp) = table.astype(float)
    under = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    expected = (tp * tn - fp * fn) / under if under else 0.0
    assert score("matthews_correlation", gold, predicted, 2) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("count", [3, 4, 7])
def test_several_classes(count: int) -> None:
    gold, predicted = classes_of(count, count, 0.6)
    expected = np.mean([f1_of(gold, predicted, label) for label in range(count)])
    assert score("f1", gold, predicted, count) == pytest.approx(float(expected), abs=1e-9)
    # Gorodkin's R_K: the correlation of the indicators, which for two classes is Matthews'.
    x, y = (np.eye(count)[values] for values in (gold, predicted))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    expected = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert score("matthews_correlation", gold, predicted, count) == pytest.approx(
        float(expected), abs=1e-9
    )


def pearson(a: Array, b: Array) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / np.sqrt((a @ a) * (b @ b)))


def ranks(values: Array) -> Array:
    """Return ranks from 1; ties share their mean rank."""
    below = (values[:, None] > values[None, :]).sum(axis=1)
    equal = (values[:, None] == values[None, :]).sum(axis=1)
    return below + (equal + 1) / 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("places", [1, 12])  # with one place many values are equal
def test_correlations(seed: int, places: int) -> None:
    draw = np.random.default_rng(seed)
    gold = np.round(draw.uniform(0, 5, COUNT), places)
    predicted = np.round(gold + draw.normal(0, 1 + seed, COUNT), places)
    assert score("pearson", gold, predicted, 0) == pytest.approx(pearson(gold, predicted), abs=1e-9)
    assert score("spearmanr", gold, predicted, 0) == pytest.approx(
        pearson(ranks(gold), ranks(predicted)), abs=1e-9
    )


@pytest.mark.parametrize("name", ["pearson", "spearmanr", "matthews_correlation"])
def test_a_constant_scores_zero(name: str) -> None:
    assert label_score(name, [0, 1, 1], [1, 1, 1], 2) == 0.0
    assert label_score(name, [1, 1, 1], [0, 1, 1], 2) == 0.0


def test_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    require_metrics(LABEL_METRICS)
    monkeypatch.setattr(labels, "find_spec", lambda name: None)
    require_metrics(["accuracy", "bleu"])
    with pytest.raises(UserError, match=r'f1 needs scikit-learn.*pip install "lorakit\[eval\]"'):
        require_metrics(["accuracy", "f1"])


def test_exact_match() -> None:
    draw = np.random.default_rng(1)
    texts = ["yes", " yes\n", "Yes", "y es", "", " ", "\u00a0no", "no"]
    left, right = (draw.choice(texts, COUNT).tolist() for _ in range(2))
    same = {"yes": 0, " yes\n": 0, "Yes": 1, "y es": 2, "": 3, " ": 3, "\u00a0no": 4, "no": 4}
    expected = np.mean([same[a] == same[b] for a, b in zip(left, right, strict=True)])
    assert exact_match(left, right) == pytest.approx(float(expected), abs=1e-9)
