"""``token_classification``: how words, tags and predictions are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorakit import registry
from lorakit.data.sources import Split
from lorakit.errors import DataError
from lorakit.tasks.token_classification import TokenClassificationConfig
from tests.tasks.wikisql_files import write_lines

TASK = registry.task("token_classification")
NAMES = ["O", "B-PER", "I-PER"]


def config(**keys: Any) -> TokenClassificationConfig:
    return TokenClassificationConfig(**{"labels": NAMES, **keys})


def split_of(*tags: Any) -> Split:
    rows = [{"tokens": ["a"] * len(each or "a"), "tags": each} for each in tags]
    return Split("train", rows, "rows", "")


@pytest.mark.parametrize("tags", [["B-PER", "O"], [1, 0], ["1", 0], '["B-PER", "O"]'])
def test_tags_are_names_or_ids(tags: Any) -> None:
    example = TASK.example({"tokens": ["Ann", "is"], "tags": tags}, config())
    assert (example.text, example.words, example.label) == ("Ann is", ("Ann", "is"), (1, 0))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"tokens": ["a"], "tags": ["O", "O"]},
            "tokens has length 1, and tags 2; allowed: one tag per word",
        ),
        ({"tokens": "a b", "tags": ["O", "O"]}, 'tokens = "a b"; allowed: a list of words'),
        ({"tokens": ["a", 1], "tags": ["O", "O"]}, "allowed: a list of words"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "a list of words, none of them empty"),
        ({"tokens": None, "tags": ["O"]}, "tokens = null; allowed: a list of words"),
        ({"tokens": [], "tags": []}, "tags = []; allowed: a list of tags"),
        ({"tokens": ["a"], "tags": None}, "tags = null; allowed: a list of tags"),
        ({"tokens": ["a"], "tags": "O"}, 'tags = "O"; allowed: a list of tags'),
        ({"tokens": ["a"], "tags": ["B-LOC"]}, "unknown label; allowed: 0 to 2 or O, B-PER, I-PER"),
        ({"tokens": ["a"], "tags": [3]}, "tags = 3: unknown label"),
        ({"tokens": ["a"], "tags": [None]}, "the label is missing"),
    ],
)
def test_rows_that_cannot_be_read(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        TASK.example(row, config())


def test_names_are_found_in_the_rows() -> None:
    found = TASK.resolve(config(labels=None), split_of(["I-X", "O"], ["B-PER", "B-X"]))
    assert found.labels == ["O", "B-PER", "B-X", "I-X"]
    assert TASK.accepts_labels(found, split_of(["O"]))
    assert not TASK.accepts_labels(found, split_of(["B-Y"]))
    for tags in ([0, 1], ["0", "1"], [None]):
        with pytest.raises(DataError, match="tags that are not names; hint: list the names"):
            TASK.resolve(config(labels=None), split_of(tags))
    skipping = config(labels=None, on_bad_row="skip")
    assert TASK.resolve(skipping, split_of(["O", "B-X"], [1], [None], None)).labels == ["O", "B-X"]
    with pytest.raises(DataError, match="fewer than 2 tags"):
        TASK.resolve(config(labels=None), split_of(["O"]))


def test_names_that_the_data_set_declares(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features({"tokens": List(Value("string")), "ner": List(ClassLabel(names=NAMES))})
    rows = Dataset.from_dict({"tokens": [["a"]], "ner": [[2]]}, features=features)
    found = TASK.resolve(config(labels=None, tags_column="ner"), Split("train", rows, "hub", ""))
    assert found.labels == NAMES


def test_predictions_are_lists_of_ids_or_names() -> None:
    split = split_of(["B-PER", "I-PER", "O"], ["O"])
    assert TASK.metrics([[1, "I-PER", 0], ["O"]], split, config()) == {
        "f1": 1.0, "precision": 1.0, "recall": 1.0, "accuracy": 1.0,
    }  # fmt: skip
    assert TASK.metrics([[1, None, 0], [None]], split, config()) == {
        "f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 0.5,
    }  # fmt: skip
    for wrong, message in (
        (0, "prediction 2: 0; allowed: a list of 1 tags, one per word"),
        ([0, 0], "prediction 2: 2 tags; allowed: a list of 1 tags"),
        ([3], "prediction 2: 3; allowed: an id, 0 to 2, a name, or null"),
        (["B-X"], 'prediction 2: "B-X"; allowed: an id'),
        ([True], "prediction 2: true; allowed: an id"),
        ([[0]], "allowed: an id"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            TASK.metrics([[0, 0, 0], wrong], split, config())


def test_tags_of_other_kinds_have_an_accuracy_only() -> None:
    speech = config(labels=["NOUN", "VERB"])
    assert TASK.main_metric(speech) == "accuracy"
    assert TASK.metrics([[0, 0]], split_of(["NOUN", "VERB"]), speech) == {"accuracy": 0.5}
    assert TASK.main_metric(config()) == "f1"


def test_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [{"tokens": ["a"], "ner_tags": ["O"]}])
    with pytest.raises(DataError, match=r'task.tags_column = "tags"'):
        TASK.load(config(path=str(tmp_path)), "train")
    assert TASK.load(config(path=str(tmp_path), tags_column="ner_tags"), "train")
