"""Entity scores, as seqeval computes them."""

from __future__ import annotations

import random
import warnings

import pytest
from seqeval import metrics

from lorakit.metrics.entities import entities, entity_scores, is_entity_tag

KINDS = ("PER", "LOC", "A-B")


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("I-PER I-PER", [("PER", 0, 1)]),  # IOB1
        ("B-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),
        ("O O", []),
        ("S-LOC E-LOC B-LOC E-LOC", [("LOC", 0, 0), ("LOC", 1, 1), ("LOC", 2, 3)]),
        ("B I O I", [("_", 0, 1), ("_", 3, 3)]),
        ("", []),
    ],
)
def test_entities_of_a_row(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert [*entities(tags.split())] == expected


def test_what_is_a_tag_of_an_entity() -> None:
    assert all(map(is_entity_tag, ("O", "B-PER", "I-A-B", "S", "E-x")))
    assert not any(map(is_entity_tag, ("", "NOUN", "OTHER", "BPER", "o", "U-PER", "b-PER")))


def test_scores_of_constructed_rows() -> None:
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", None]]
    assert entity_scores(gold, found) == pytest.approx(
        {"f1": 1 / 3, "precision": 1 / 3, "recall": 1 / 3, "accuracy": 3 / 6}
    )
    assert entity_scores([["O"]], [["O"]]) == {
        "f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_equal_to_seqeval(seed: int) -> None:
    chosen = random.Random(seed)
    tags = ["O", *(f"{prefix}-{kind}" for kind in KINDS for prefix in "BIES"[: 2 + 2 * (seed % 2)])]
    gold = [chosen.choices(tags, k=chosen.randint(1, 12)) for _ in range(chosen.randint(1, 30))]
    noise = [1.0, 0.3, 0.1][seed % 3]
    found = [[chosen.choice(tags) if chosen.random() < noise else t for t in row] for row in gold]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "f1": metrics.f1_score(gold, found),
            "precision": metrics.precision_score(gold, found),
            "recall": metrics.recall_score(gold, found),
            "accuracy": metrics.accuracy_score(gold, found),
        }
    assert entity_scores(gold, found) == pytest.approx(expected, abs=1e-12)
