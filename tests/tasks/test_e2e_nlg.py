"""``e2e_nlg``: defaults, instances, and scores on released data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit import registry
from lorakit.data.sources import Split
from lorakit.errors import DataError
from lorakit.metrics.coco_caption import cider, rouge_l
from lorakit.metrics.mteval import bleu, nist, tokenize
from lorakit.pipeline.predictions import score_file
from tests.tasks.wikisql_files import write_lines

TASK = registry.tasks()["e2e_nlg"]
CONFIG = TASK.Config()
ROWS = [
    ("name[Kettle], food[Thai]", "Kettle serves Thai food."),
    ("name[Zizou], food[fish]", "At Zizou you eat fish."),
    ("name[Kettle],  food[Thai]", "Thai food is served at the Kettle."),
    ("name[Kettle], food[fish]", "Kettle is a fish restaurant."),
    ("name[Zizou], food[fish]", "Zizou has fish."),
]


def split_of(rows: list[tuple[Any, Any]]) -> Split:
    names = ("meaning_representation", "human_reference")
    return Split("validation", [dict(zip(names, row, strict=True)) for row in rows], "rows", "")


def test_the_defaults_are_those_of_the_paper() -> None:
    assert (CONFIG.num_beams, CONFIG.length_penalty, CONFIG.no_repeat_ngram_size) == (10, 0.9, 4)
    assert CONFIG.max_new_tokens == 64
    assert TASK.stop_texts(CONFIG) == ("\n",)
    assert TASK.main_metric(CONFIG) == "bleu"
    assert TASK.best_metric(CONFIG) == "loss"
    assert TASK.generates(CONFIG)


def test_rows_with_equal_inputs_form_one_instance() -> None:
    predictions = ["Kettle serves food.", "Zizou eats fish.", "late", "Kettle is fish.", "later"]
    references = [[ROWS[i][1] for i in rows] for rows in ([0, 2], [1, 4], [3])]
    firsts = [predictions[0], predictions[1], predictions[3]]
    expected = {
        "bleu": bleu(firsts, references),
        "nist": nist(firsts, references),
        "rouge_l": rouge_l(firsts, references),
        "cider": cider(firsts, references),
    }
    assert TASK.metrics(predictions, split_of(ROWS), CONFIG) == expected
    assert TASK.metrics(firsts, split_of(ROWS), CONFIG) == expected
    assert min(expected.values()) > 0


def test_one_prediction_per_row_or_per_instance(tmp_path: Path) -> None:
    split = split_of(ROWS)
    scores = []
    for count in (5, 3):
        file = write_lines(tmp_path / f"{count}.jsonl", [{"prediction": "Kettle"}] * count)
        scores.append(score_file(TASK, CONFIG, split, file))
    assert scores[0] == scores[1]
    file = write_lines(tmp_path / "4.jsonl", [{"prediction": "Kettle"}] * 4)
    with pytest.raises(
        DataError, match=r"4\.jsonl: 4 predictions; the split has 5 rows; allowed: 5 or 3"
    ):
        score_file(TASK, CONFIG, split, file)
    with pytest.raises(DataError, match="4 predictions for 5 rows with 3 distinct inputs"):
        TASK.metrics(["Kettle"] * 4, split, CONFIG)


@pytest.mark.parametrize("prediction", [None, 3, ["Kettle"], {"query": {}}])
def test_predictions_that_are_not_text_are_refused(prediction: Any) -> None:
    with pytest.raises(DataError, match=r"prediction 2: .*; allowed: text"):
        TASK.metrics(["a", prediction, "b"], split_of(ROWS), CONFIG)


def test_a_row_without_reference_is_named() -> None:
    with pytest.raises(DataError, match="rows, row 2: column 'human_reference' = \" \""):
        TASK.metrics(["a", "b"], split_of([ROWS[0], (ROWS[1][0], " ")]), CONFIG)


@pytest.mark.parametrize(
    ("shift", "golden"),
    [
        (0, [1.0, 14.033477806887136, 1.0, 3.040918503384456]),
        (1, [0.38297767898739704, 5.980794206299452, 0.5219278185240948, 1.252166576719247]),
    ],
)
def test_released_rows(data_dir: Path, shift: int, golden: list[float]) -> None:
    """Predict each instance's first reference, or the next instance's; the scores are those of
    tuetschek/e2e-metrics@1b9c4d87 (see tests/metrics/make_golden.py)."""
    split = TASK.load(TASK.Config(path=str(data_dir / "e2e_nlg")), "validation")
    first: dict[str, str] = {}
    for row in split.rows:
        first.setdefault(row["meaning_representation"], row["human_reference"])
    texts = list(first.values())
    assert (len(split), len(texts)) == (4672, 547)
    assert min(len(tokenize(text)) for text in texts) >= 5, "else those scripts differ"
    scores = TASK.metrics(texts[shift:] + texts[:shift], split, CONFIG)
    assert list(scores) == ["bleu", "nist", "rouge_l", "cider"]
    assert list(scores.values()) == pytest.approx(golden, abs=1e-9)
