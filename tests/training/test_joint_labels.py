"""Joint training of classifiers of several labels per row, and of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.training.joint import can_join
from tests.training.joint_runs import assert_equal_to_single_runs, members
from tests.training.runs import WORDS, recipe_for, write_rows
from tests.training.tagged import tagged_rows, write_word_pieces

CHANGES: list[dict[str, Any]] = [
    {"train__seed": 1},
    {"train__seed": 2, "train__per_device_batch_size": 5, "task__class_weights": "balanced"},
]


def test_several_labels_of_several_numbers_of_classes(still_bert: Path, tmp_path: Path) -> None:
    recipes = []
    for classes in (2, 3):
        folder = tmp_path / str(classes)
        rows = [
            {"text": " ".join(WORDS[: i % 9 + 1]), "label": [f"c{i % classes}", f"c{i % 2}"]}
            for i in range(24)
        ]
        for split in ("train", "validation"):
            write_rows(folder / "data" / f"{split}.jsonl", rows)
        own = CHANGES[1:2] if classes == 2 else CHANGES[:1]
        recipes += members(folder, still_bert, "classification", own, task__multi_label=True)
    assert_equal_to_single_runs(recipes)


def test_labels_of_words(tmp_path: Path) -> None:
    base = write_word_pieces(tmp_path / "base")
    for split, count in (("train", 21), ("validation", 9)):
        write_rows(tmp_path / "data" / f"{split}.jsonl", tagged_rows(count))
    common = {"task__max_length": 64, "train__epochs": 1}
    assert_equal_to_single_runs(
        members(tmp_path, base, "token_classification", CHANGES[:2], **common)
    )


def test_labels_of_several_kinds_do_not_join(still_bert: Path, tmp_path: Path) -> None:
    one = recipe_for(tmp_path, still_bert, "classification")
    several = recipe_for(tmp_path, still_bert, "classification", task__multi_label=True)
    words = recipe_for(tmp_path, still_bert, "token_classification")
    assert can_join(one, several) == "task.multi_label differs"
    assert can_join(one, words) == 'task.name differs: "classification" and "token_classification"'
    assert can_join(several, several) is None
