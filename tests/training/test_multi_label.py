"""A classifier of several labels per row: trained, scored, merged and used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import lorakit
from lorakit.errors import UserError
from tests.families import save_classifier
from tests.training.runs import log_lines, recipe_for, write_rows

NAMES = ["bad", "fair", "very good"]


def rows(count: int) -> list[dict[str, Any]]:
    words = "red green blue one two three four".split()  # noqa: SIM905
    return [
        {
            "text": " ".join(words[i % 3 : i % 7 + 2]),
            "label": [name for bit, name in enumerate(NAMES) if (i + 1) >> bit & 1],
        }
        for i in range(count)
    ]


def prepare(folder: Path, tokenizer: Path, **changes: Any) -> Any:
    base = save_classifier(
        folder / "base", tokenizer, NAMES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    write_rows(folder / "data" / "train.jsonl", rows(21))
    write_rows(folder / "data" / "validation.jsonl", rows(9))
    keys = {
        "task__multi_label": True,
        "task__max_length": 64,
        "train__max_steps": 3,
        "train__epochs": None,
        **changes,
    }
    return recipe_for(folder, base, "classification", **keys)


@pytest.fixture(scope="module")
def trained(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = prepare(tmp_path_factory.mktemp("several"), tiny_bert)
    return recipe, lorakit.train(recipe)


def test_the_loss_is_that_of_transformers(trained: Any) -> None:
    """The first step's loss, over a step of two micro-batches."""
    recipe, run = trained
    name = recipe.model.name_or_path
    model = AutoModelForSequenceClassification.from_pretrained(
        name, problem_type="multi_label_classification"
    )
    first = lorakit.load(name, run.adapter_dir)
    assert first.config.problem_type == model.config.problem_type
    tokenizer = AutoTokenizer.from_pretrained(name)
    split = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(
                update={
                    "max_steps": 1, "per_device_batch_size": 11,
                    "gradient_accumulation_steps": 2,
                    "output_dir": recipe.train.output_dir + "-split",
                }
            )
        }
    )  # fmt: skip
    lorakit.train(split)
    given = rows(21)
    batch = tokenizer([row["text"] for row in given], padding=True, return_tensors="pt")
    labels = torch.tensor([[float(name in row["label"]) for name in NAMES] for row in given])
    with torch.no_grad():
        expected = model(**batch, labels=labels).loss
    (line,) = log_lines(Path(split.train.output_dir))
    assert line["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_scores_and_predictions_are_those_of_the_pipeline_on_the_merged_model(
    trained: Any, tmp_path: Path
) -> None:
    recipe, run = trained
    assert set(run.metrics) == {"loss", "f1_micro", "f1_macro", "subset_accuracy"}
    assert lorakit.evaluate(recipe, run.adapter_dir) == pytest.approx(run.metrics, rel=1e-6)
    merged = tmp_path / "merged"
    lorakit.merge(recipe.model.name_or_path, run.adapter_dir, merged)
    config = json.loads((merged / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    classify = pipeline("text-classification", model=str(merged), device="cpu")
    texts = [row["text"] for row in rows(9)]
    gold = np.array([[name in row["label"] for name in NAMES] for row in rows(9)])
    found = []
    for model in (run.adapter_dir, merged):
        predicted = lorakit.predict(model, texts)
        for row, scores in zip(predicted, classify(texts, top_k=None), strict=True):
            expected = {score["label"]: score["score"] for score in scores}
            assert list(row["scores"]) == NAMES
            assert row["scores"] == pytest.approx(expected, abs=1e-5)
            assert row["labels"] == [name for name in NAMES if expected[name] >= 0.5]
        found = [[name in row["labels"] for name in NAMES] for row in predicted]
    right = (np.array(found) == gold).all(axis=1).mean()
    assert run.metrics["subset_accuracy"] == pytest.approx(right)


def test_peft_loads_the_adapter_with_equal_logits(trained: Any) -> None:
    recipe, run = trained
    base = AutoModelForSequenceClassification.from_pretrained(recipe.model.name_or_path)
    theirs = peft.PeftModel.from_pretrained(base, run.adapter_dir).eval()
    ours, tokenizer = lorakit.load_with_tokenizer(run.adapter_dir)
    batch = tokenizer([row["text"] for row in rows(9)], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits)


def test_columns_of_flags_are_trained_alike(trained: Any, tmp_path: Path, tiny_bert: Path) -> None:
    _, run = trained
    other = prepare(
        tmp_path, tiny_bert, task__label_columns=NAMES, task__labels=None,
        task__multi_label=False,
    )  # fmt: skip
    for name, count in (("train", 21), ("validation", 9)):
        flags = [
            {
                "text": row["text"],
                **{name: int(name in row["label"]) for name in NAMES},
            }
            for row in rows(count)
        ]
        write_rows(tmp_path / "data" / f"{name}.jsonl", flags)
    assert lorakit.train(other).metrics == run.metrics


def test_a_stream_and_a_skipped_row(tmp_path: Path, tiny_bert: Path) -> None:
    recipe = prepare(
        tmp_path, tiny_bert, task__streaming=True, task__on_bad_row="skip", task__labels=NAMES
    )
    bad = [{"text": "a", "label": ["worse"]}, {"text": "a", "label": "bad"}]
    write_rows(tmp_path / "data" / "train.jsonl", [*bad, *rows(21)])
    run = lorakit.train(recipe)
    assert run.metrics["loss"] > 0


def test_label_smoothing_is_refused(tmp_path: Path, tiny_bert: Path) -> None:
    with pytest.raises(UserError, match=r"train.label_smoothing = 0.1: not supported for several"):
        prepare(tmp_path, tiny_bert, train__label_smoothing=0.1)
