"""``classification`` with several labels per row: how labels and predictions are read."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from lorakit import registry
from lorakit.data.sources import Split
from lorakit.errors import DataError
from lorakit.tasks.classification import ClassificationConfig

TASK = registry.task("classification")
NAMES = ["dull", "long", "witty"]


def config(**keys: Any) -> ClassificationConfig:
    return ClassificationConfig(**{"multi_label": True, "labels": NAMES, **keys})


def split_of(labels: list[Any]) -> Split:
    return Split("train", [{"text": "a", "label": label} for label in labels], "rows", "")


def flags_of(label: Any, **keys: Any) -> Any:
    return TASK.example({"text": "a", "label": label}, config(**keys)).label


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ([], (0, 0, 0)),
        (["witty", "dull"], (1, 0, 1)),
        ([2, 0], (1, 0, 1)),
        (["witty", 2, "2"], (0, 0, 1)),
        ('["long"]', (0, 1, 0)),  # as csv has it
        ("[]", (0, 0, 0)),
    ],
)
def test_lists_of_names_and_ids(label: Any, expected: tuple[int, ...]) -> None:
    assert flags_of(label) == expected


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "label = null; allowed: a list of labels, empty for a row without"),
        ("witty", 'label = "witty"; allowed: a list of labels'),
        (1, "label = 1; allowed: a list of labels"),
        ("[1,", "allowed: a list of labels"),
        (["Witty"], "did you mean 'witty'?"),
        ([3], "label = 3: unknown label; allowed: 0 to 2 or dull, long, witty"),
        ([None], "label = null: the label is missing"),
        ([["dull"]], "unknown label"),
    ],
)
def test_labels_that_cannot_be_read(label: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        flags_of(label)


def test_a_list_without_the_key() -> None:
    with pytest.raises(DataError, match=r"set task.multi_label: true"):
        flags_of(["dull"], multi_label=False)
    with pytest.raises(DataError, match=r"set task.multi_label: true"):
        TASK.labels(ClassificationConfig(), split_of([["dull"], ["long"]]))


def test_names_are_found_in_the_rows() -> None:
    found = TASK.resolve(config(labels=None), split_of([["b", "a"], [], ["c"], ["a"]]))
    assert found.labels == ["a", "b", "c"]
    numbers = TASK.resolve(config(labels=None), split_of([[10, 9], [11]]))
    assert numbers.labels == ["9", "10", "11"]
    assert TASK.accepts_labels(found, split_of([["a"], []]))
    assert not TASK.accepts_labels(found, split_of([["d"]]))
    with pytest.raises(DataError, match="only one label, a"):
        TASK.resolve(config(labels=None), split_of([["a"], []]))
    with pytest.raises(DataError, match="allowed: a list of names or whole numbers"):
        TASK.resolve(config(labels=None), split_of([["a"], "b"]))


@pytest.mark.parametrize("values", [(1, 0, True), ("1", "0", "1"), (1.0, 0.0, 1)])
def test_columns_of_flags(values: tuple[Any, ...]) -> None:
    keys = config(labels=None, multi_label=False, label_columns=NAMES)
    row = {"text": "a", **dict(zip(NAMES, values, strict=True))}
    assert TASK.columns(keys) == ("text", *NAMES)
    resolved = TASK.resolve(keys, Split("train", [row], "rows", ""))
    assert resolved.labels == NAMES
    assert TASK.problem(resolved) == "multi_label_classification"
    assert TASK.example(row, resolved).label == (1, 0, 1)
    assert TASK.metrics([[0, 2]], Split("validation", [row], "rows", ""), resolved) == {
        "f1_micro": 1.0, "f1_macro": pytest.approx(2 / 3), "subset_accuracy": 1.0,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"long = 2; allowed: 0, 1, true, false"):
        TASK.example(row | {"long": 2}, resolved)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"regression": True, "labels": None}, "multi_label: true and regression: true"),
        ({"label_columns": ["a", "a"]}, "label_columns: duplicate name 'a'"),
        ({"label_columns": ["a", "b"]}, "the classes are those of label_columns"),
        ({"label_columns": NAMES, "label_column": "x"}, "label_column and label_columns"),
        ({"label_columns": ["a"]}, "at least 2"),
    ],
)
def test_keys_that_exclude_each_other(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**keys)


def test_predictions_are_lists_of_ids_or_names() -> None:
    split = split_of([["dull"], ["long", "witty"]])
    assert TASK.metrics([[0], ["long", 2]], split, config())["subset_accuracy"] == 1.0
    for wrong in (0, ["x"], [3], [True], None, {"error": "x"}, [-1]):
        with pytest.raises(
            DataError, match=r"prediction 2: .*allowed: a list of label ids, 0 to 2"
        ):
            TASK.metrics([[], wrong], split, config())
