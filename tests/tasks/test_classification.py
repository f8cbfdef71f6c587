"""``glue`` and ``classification``: columns, labels, errors and scores."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lorakit import registry
from lorakit.data.sources import Split
from lorakit.errors import DataError, UserError
from lorakit.metrics import labels as label_metrics
from lorakit.tasks.glue import GlueConfig
from tests.tasks.wikisql_files import write_lines

TASKS = registry.tasks()
GLUE = TASKS["glue/sst2"]
CLASSIFICATION = TASKS["classification"]
NAMES = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")


def glue(name: str, **keys: Any) -> GlueConfig:
    return GlueConfig(name=f"glue/{name}", **keys)


def split_of(rows: list[dict[str, Any]]) -> Split:
    return Split("validation", rows, "rows", "")


def labels_as_split(labels: list[Any], column: str = "label") -> Split:
    return split_of([{column: label} for label in labels])


@pytest.mark.parametrize("name", NAMES)
def test_every_glue_task(name: str) -> None:
    config = glue(name)
    assert TASKS[f"glue/{name}"] is GLUE
    assert GLUE.kind == "encoder"
    assert GLUE.hub_source(config) == ("nyu-mll/glue", name)
    assert GLUE.columns(config)[-1] == "label"
    assert GLUE.eval_split(config) == ("validation_matched" if name == "mnli" else "validation")
    assert (GLUE.labels(config, None) is None) == (name == "stsb")
    assert GLUE.main_metric(config) == {
        "cola": "matthews_correlation",
        "stsb": "pearson",
    }.get(name, "accuracy")


@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "mnli", "qnli", "rte"])
def test_released_glue_rows(data_dir: Path, name: str) -> None:
    config = glue(name, path=str(data_dir / "glue" / name), limit_train=500)
    for split in ("train", GLUE.eval_split(config)):
        found = GLUE.load(config, split)
        examples = [GLUE.example(row, config) for row in found.rows]
        assert {example.text_pair is None for example in examples} == {name in ("cola", "sst2")}
        gold = [example.label for example in examples]
        assert len(set(gold)) == len(GLUE.labels(config, None) or set(gold))
    perfect = GLUE.metrics(gold, found, config)
    assert perfect == pytest.approx(dict.fromkeys(perfect, 1.0))


def test_mnli_falls_back_to_validation(tmp_path: Path) -> None:
    row = {"premise": "a", "hypothesis": "b", "label": 0}
    file = write_lines(tmp_path / "validation.jsonl", [row])
    for path in (str(tmp_path), {"validation": str(file)}):
        config = glue("mnli", path=path)
        assert GLUE.eval_split(config) == "validation"
    write_lines(tmp_path / "validation_matched.jsonl", [row])
    assert GLUE.eval_split(glue("mnli", path=str(tmp_path))) == "validation_matched"


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (-1, "hidden"),
        ("-1", "hidden"),
        (2, "allowed: 0 to 1 or negative, positive"),
        (0.5, "unknown label"),
        ("good", "unknown label"),
        ("", "missing"),
        (None, "missing"),
        (math.nan, "missing"),
        ([1], "unknown label"),
    ],
)
def test_invalid_class_labels_are_refused(label: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        GLUE.example({"sentence": "fine", "label": label}, glue("sst2"))


@pytest.mark.parametrize(
    ("label", "index"), [(1, 1), (True, 1), (1.0, 1), ("1", 1), ("negative", 0)]
)
def test_labels_by_id_and_name(label: Any, index: int) -> None:
    read = GLUE.example({"sentence": "fine", "label": label}, glue("sst2")).label
    assert (read, type(read)) == (index, int)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (-1, "hidden"),
        (5.1, "allowed: 0 to 5"),
        (math.nan, "missing"),
        (math.inf, "allowed: 0 to 5"),
        ("five", "allowed: 0 to 5"),
        (True, "allowed: 0 to 5"),
    ],
)
def test_invalid_targets_are_refused(label: Any, expected: str) -> None:
    row = {"sentence1": "a", "sentence2": "b", "label": label}
    with pytest.raises(DataError, match=expected):
        GLUE.example(row, glue("stsb"))


def test_targets_are_floats() -> None:
    for label in (4, 4.0, "4.0"):
        row = {"sentence1": "a", "sentence2": "b", "label": label}
        assert GLUE.example(row, glue("stsb")).label == 4.0


def test_a_value_that_is_not_text_is_refused() -> None:
    with pytest.raises(DataError, match="column 'sentence' = 7; allowed: text"):
        GLUE.example({"sentence": 7, "label": 1}, glue("sst2"))


def test_binary_scores() -> None:
    gold, predicted = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    scores = GLUE.metrics(predicted, labels_as_split(gold), glue("mrpc"))
    assert scores == pytest.approx({"accuracy": 3 / 5, "f1": 2 * 2 / (2 * 2 + 1 + 1)})
    matthews = (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    scores = GLUE.metrics(predicted, labels_as_split(gold), glue("cola"))
    assert scores == pytest.approx({"matthews_correlation": matthews})


def test_a_class_that_only_the_head_has_is_always_wrong() -> None:
    other = {"error": "the class neutral"}
    scores = GLUE.metrics([1, other, 0, other], labels_as_split([1, 1, 0, 0]), glue("mrpc"))
    assert scores == pytest.approx({"accuracy": 2 / 4, "f1": 2 * 1 / (2 * 1 + 1)})
    config = CLASSIFICATION.Config(labels=["a", "b", "c"])
    scores = CLASSIFICATION.metrics([0, other, 1], labels_as_split([0, 0, 1]), config)
    assert scores == pytest.approx({"accuracy": 2 / 3, "f1": (2 / 3 + 1 + 0) / 3})


def test_a_similar_label_is_suggested() -> None:
    config = CLASSIFICATION.Config(labels=["Positive", "negative"])
    with pytest.raises(DataError, match=r"unknown label \(did you mean 'Positive'\?\);"):
        CLASSIFICATION.example({"text": "a", "label": "positive "}, config)


def test_macro_f1_counts_every_class() -> None:
    config = CLASSIFICATION.Config(labels=["a", "b", "c"])
    scores = CLASSIFICATION.metrics([0, 0, 0, 1], labels_as_split([0, 0, 1, 1]), config)
    # a: 2*2/(2*2+1), b: 2*1/(2*1+1), c never occurs and counts 0
    assert scores == pytest.approx({"accuracy": 0.75, "f1": (0.8 + 2 / 3 + 0) / 3})


def test_correlations() -> None:
    scores = GLUE.metrics([1.0, 2.0, 4.0], labels_as_split([0.0, 1.0, 2.0]), glue("stsb"))
    assert scores == pytest.approx({"pearson": 3 / math.sqrt(2 * 14 / 3), "spearmanr": 1.0})


@pytest.mark.parametrize(("name", "constant"), [("stsb", 2.5), ("cola", 0), ("mrpc", 0)])
@pytest.mark.filterwarnings("error")
def test_constant_predictions_are_never_nan(name: str, constant: float) -> None:
    scores = GLUE.metrics([constant] * 4, labels_as_split([0, 1, 1, 1]), glue(name))
    assert {metric: value for metric, value in scores.items() if metric != "accuracy"} == {
        metric: 0.0 for metric in scores if metric != "accuracy"
    }


@pytest.mark.filterwarnings("error")
def test_a_single_class_causes_no_warning() -> None:
    scores = GLUE.metrics([1, 1], labels_as_split([1, 1]), glue("cola"))
    assert scores == {"matthews_correlation": 0.0}


@pytest.mark.parametrize("prediction", [2, -1, 0.5, "1", True, None, math.nan])
def test_predictions_that_are_not_labels_are_refused(prediction: Any) -> None:
    with pytest.raises(DataError, match=r"prediction 2: .*allowed: a label id, 0 to 1"):
        GLUE.metrics([0, prediction], labels_as_split([0, 1]), glue("sst2"))


@pytest.mark.parametrize("prediction", ["1", None, math.nan, math.inf, True, 10**400])
def test_predictions_that_are_not_numbers_are_refused(prediction: Any) -> None:
    with pytest.raises(DataError, match=r"prediction 1: .*allowed: a finite number"):
        GLUE.metrics([prediction, 1], labels_as_split([0, 1]), glue("stsb"))


def test_hidden_labels_are_reported_with_their_row() -> None:
    with pytest.raises(DataError, match=r"rows, row 2: label = -1: .*hidden"):
        GLUE.metrics([0, 0], labels_as_split([0, -1]), glue("sst2"))


def test_missing_metric_libraries_are_reported_first(monkeypatch: pytest.MonkeyPatch) -> None:
    GLUE.check_requirements(glue("cola"))
    monkeypatch.setattr(label_metrics, "find_spec", lambda name: None)
    GLUE.check_requirements(glue("sst2"))
    for name, package in (("cola", "scikit-learn"), ("stsb", "scipy"), ("mrpc", "scikit-learn")):
        with pytest.raises(UserError, match=rf'{package}.*pip install "lorakit\[eval\]"'):
            GLUE.check_requirements(glue(name))


def test_any_columns() -> None:
    config = CLASSIFICATION.Config(
        text_column="a", text_pair_column="b", label_column="y", labels=["no", "yes"]
    )
    example = CLASSIFICATION.example({"a": "x", "b": "z", "y": "yes"}, config)
    assert (example.text, example.text_pair, example.label) == ("x", "z", 1)
    assert CLASSIFICATION.columns(config) == ("a", "b", "y")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["spam", "ham", "spam"], ["ham", "spam"]),
        ([2, 0, 1, 1], ["0", "1", "2"]),
        ([True, False], ["0", "1"]),
        (["10", "9", "9"], ["9", "10"]),
        (["1", "0"], ["0", "1"]),
        ([1, 2, 1], ["1", "2"]),
        (["1", "2", "1"], ["1", "2"]),
        ([4, 2, 8, 6], ["2", "4", "6", "8"]),
        ([-1, 1], ["-1", "1"]),
        (["007", "7"], ["007", "7"]),
    ],
)
def test_labels_from_train(values: list[Any], names: list[str]) -> None:
    config = CLASSIFICATION.resolve(CLASSIFICATION.Config(), labels_as_split(values))
    assert config.labels == names
    for value in values:
        index = CLASSIFICATION.example({"text": "x", "label": value}, config).label
        assert names[index] == str(int(value) if isinstance(value, bool) else value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2, "2"], "only one label, 2"),
        (["a", 1], "mixes names and numbers"),
        (["a", "a"], "only one label, a"),
        (["a", None], "row 2: label = null"),
        (["a", ""], 'row 2: label = ""'),
        ([0.5, 1.5], "row 1: label = 0.5.*regression: true"),
        (["1.0", "0.5"], 'row 2: label = "0.5".*regression: true'),
    ],
)
def test_invalid_labels_of_the_train_split_are_refused(values: list[Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        CLASSIFICATION.labels(CLASSIFICATION.Config(), labels_as_split(values))


@pytest.mark.parametrize("label", [2, "2", 2.0, "2.0"])
def test_numeric_names_are_never_ids(label: Any) -> None:
    for values in ([2, 4, 6, 8], ["2", "4", "6", "8"], ["2.0", "4.0", "6.0", "8.0"]):
        config = CLASSIFICATION.resolve(CLASSIFICATION.Config(), labels_as_split(values))
        assert CLASSIFICATION.example({"text": "x", "label": label}, config).label == 0
        for unknown in (3, "3", 0, -1 if label == 2 else 1):
            with pytest.raises(DataError, match=r"(unknown label; allowed: 2, 4, 6, 8$|hidden)"):
                CLASSIFICATION.example({"text": "x", "label": unknown}, config)


def test_labels_declared_by_a_hub_data_set() -> None:
    import datasets

    features = {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["x", "y", "z"]),
    }
    rows = datasets.Dataset.from_dict({"text": ["t"], "label": [1]}, datasets.Features(features))
    split = Split("train", rows, "hub", "")
    assert CLASSIFICATION.labels(CLASSIFICATION.Config(), split) == ["x", "y", "z"]


@pytest.mark.parametrize("several", [False, True])
def test_names_of_rows_of_which_bad_ones_are_skipped(several: bool) -> None:
    split = labels_as_split([["b"], None, ["a", "b"]] if several else ["b", None, "a"])
    config = CLASSIFICATION.Config(multi_label=several)
    assert CLASSIFICATION.labels_of_rows(config, [split]) is None
    skipping = config.model_copy(update={"on_bad_row": "skip"})
    assert CLASSIFICATION.labels_of_rows(skipping, [split]) == ["b", "a"]


def test_labels_without_train() -> None:
    with pytest.raises(DataError, match=r"task\.labels = null"):
        CLASSIFICATION.resolve(CLASSIFICATION.Config(), None)


def test_regression() -> None:
    config = CLASSIFICATION.resolve(CLASSIFICATION.Config(regression=True), None)
    assert CLASSIFICATION.labels(config, None) is None
    assert CLASSIFICATION.main_metric(config) == "pearson"
    assert CLASSIFICATION.example({"text": "x", "label": -1}, config).label == -1.0
    with pytest.raises(DataError, match="allowed: a finite number"):
        CLASSIFICATION.example({"text": "x", "label": "much"}, config)


@pytest.mark.parametrize(
    "keys", [{"labels": ["a"]}, {"labels": ["a", "a"]}, {"labels": ["a", "b"], "regression": True}]
)
def test_mutually_exclusive_keys_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CLASSIFICATION.Config(**keys)


def test_tasks_import_nothing_heavy() -> None:
    code = (
        "import sys; from lorakit import registry; registry.tasks(); "
        "print(sorted({'torch', 'datasets', 'numpy', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
