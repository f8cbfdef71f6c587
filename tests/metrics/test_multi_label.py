"""F1 and accuracy of rows with several labels, as scikit-learn computes them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from lorakit.metrics.multi_label import multi_label_scores


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = (random.integers(1, 30), random.integers(2, 6))
    gold, found = (random.random(shape) < random.random(shape[1]) for _ in range(2))
    expected = {
        "f1_micro": f1_score(gold, found, average="micro", zero_division=0),
        "f1_macro": f1_score(gold, found, average="macro", zero_division=0),
        "subset_accuracy": accuracy_score(gold, found),
    }
    own = multi_label_scores(gold.astype(int).tolist(), found.astype(int).tolist())
    assert own == pytest.approx(expected, abs=1e-12)


def test_rows_without_labels() -> None:
    empty = [[0, 0], [0, 0]]
    assert multi_label_scores(empty, empty) == {
        "f1_micro": 0.0, "f1_macro": 0.0, "subset_accuracy": 1.0,
    }  # fmt: skip
