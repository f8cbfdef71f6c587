"""Class weights in the loss, as torch's losses with ``weight`` and ``pos_weight`` weigh it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lorakit
from lorakit.errors import UserError
from tests.families import save_classifier
from tests.training.joint_runs import assert_equal_runs, members, train_alone, train_together
from tests.training.runs import class_rows, log_lines, recipe_for, run_json, write_rows
from tests.training.tagged import TAGS, tagged_recipe, tagged_rows, write_word_pieces

NAMES = ["bad", "fair", "very good"]


def rows(count: int) -> list[dict[str, Any]]:
    found = class_rows(count)
    return [{"text": r["sentence"], "label": NAMES[(i % 4) % 3]} for i, r in enumerate(found)]


def first_loss(recipe: Any) -> float:
    lorakit.train(recipe)
    return float(log_lines(Path(recipe.train.output_dir))[0]["loss"])


@pytest.fixture(scope="module")
def base(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "base"
    return save_classifier(
        folder, tiny_bert, NAMES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def weighted(folder: Path, base: Path, given: Any, **changes: Any) -> Any:
    """One step of all rows, in batches of 4."""
    write_rows(folder / "data" / "train.jsonl", rows(11))
    keys = {
        "task__max_length": 64, "task__class_weights": given, "train__epochs": None,
        "train__max_steps": 1, "train__per_device_batch_size": 4,
        "train__gradient_accumulation_steps": 3, **changes,
    }  # fmt: skip
    return recipe_for(folder, base, "classification", **keys)


@pytest.mark.parametrize(
    ("given", "weights", "smoothing"),
    [
        ({"very good": 5, "bad": 0.25}, [0.25, 1.0, 5.0], 0.0),
        ([2.0, 0.5, 3.0], [2.0, 0.5, 3.0], 0.1),
        ("balanced", [11 / (3 * 5), 11 / (3 * 3), 11 / (3 * 3)], 0.0),
    ],
    ids=["by name", "list", "balanced"],
)
def test_the_loss_of_a_step_is_that_of_torch(
    base: Path, tmp_path: Path, given: Any, weights: list[float], smoothing: float
) -> None:
    recipe = weighted(tmp_path, base, given, train__label_smoothing=smoothing)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    batch = AutoTokenizer.from_pretrained(base)(
        [row["text"] for row in rows(11)], padding=True, return_tensors="pt"
    )
    gold = torch.tensor([NAMES.index(row["label"]) for row in rows(11)])
    loss = nn.CrossEntropyLoss(torch.tensor(weights), label_smoothing=smoothing)
    with torch.no_grad():
        expected = float(loss(model(**batch).logits, gold))
    assert first_loss(recipe) == pytest.approx(expected, rel=1e-5)
    assert run_json(Path(recipe.train.output_dir))["trained_tokens"] == 11


def test_the_loss_of_several_labels_is_that_of_torch(base: Path, tmp_path: Path) -> None:
    labels = [[name for bit, name in enumerate(NAMES) if i >> bit & 1] for i in range(11)]
    recipe = weighted(tmp_path, base, "balanced", task__multi_label=True)
    given = [{"text": row["text"], "label": own} for row, own in zip(rows(11), labels, strict=True)]
    write_rows(tmp_path / "data" / "train.jsonl", given)
    gold = torch.tensor([[float(name in own) for name in NAMES] for own in labels])
    weights = (11 - gold.sum(0)) / gold.sum(0)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    batch = AutoTokenizer.from_pretrained(base)(
        [row["text"] for row in given], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = nn.BCEWithLogitsLoss(pos_weight=weights)(model(**batch).logits, gold)
    assert first_loss(recipe) == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_of_words_is_that_of_torch(tmp_path: Path) -> None:
    base = write_word_pieces(tmp_path / "base")
    keys = {"train__max_steps": 1, "train__gradient_accumulation_steps": 2}
    keys |= {"train__learning_rate": 1e-9, "task__class_weights": {"O": 0.1, "B-PER": 3}}
    recipe = tagged_recipe(tmp_path, base, **keys)
    adapter = lorakit.train(recipe).adapter_dir
    model, tokenizer = lorakit.load_with_tokenizer(adapter)
    weights = torch.tensor([0.1, 1.0, 1.0, 3.0, 1.0])
    logits, gold = [], []
    for row in tagged_rows(16):
        batch = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        words = batch.word_ids(0)
        first = [words.index(word) for word in range(len(row["tags"]))]
        with torch.no_grad():
            logits.append(model(**batch).logits[0, first])
        gold += [TAGS.index(tag) for tag in row["tags"]]
    expected = nn.CrossEntropyLoss(weights)(torch.cat(logits), torch.tensor(gold))
    assert first_loss(recipe_copy(recipe)) == pytest.approx(float(expected), rel=1e-5)


def recipe_copy(recipe: Any) -> Any:
    train = recipe.train.model_copy(update={"output_dir": recipe.train.output_dir + "-again"})
    return recipe.model_copy(update={"train": train})


def test_a_stream_is_trained_alike(base: Path, tmp_path: Path) -> None:
    """Of one step of all rows the order does not matter."""
    losses = []
    for streams in (False, True):
        keys = {"task__labels": NAMES, "task__streaming": streams, "train__group_by_length": False}
        recipe = weighted(tmp_path / str(streams), base, [2.0, 0.5, 3.0], **keys)
        write_rows(tmp_path / str(streams) / "data" / "train.jsonl", rows(12))
        losses.append(first_loss(recipe))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_members_with_other_weights_are_trained_together(base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", rows(30))
    write_rows(tmp_path / "data" / "validation.jsonl", rows(8))
    changes: list[dict[str, Any]] = [
        {}, {"task__class_weights": "balanced"}, {"task__class_weights": [1, 2, 0.5]},
    ]  # fmt: skip
    common = {"task__max_length": 64, "train__epochs": 1}
    recipes = members(tmp_path, base, "classification", changes, **common)
    for recipe, result in zip(recipes, train_together(recipes), strict=True):
        assert not isinstance(result, Exception), result
        assert_equal_runs(result.output_dir, train_alone(recipe))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"worse": 2}, r"task.class_weights: unknown class 'worse'; allowed: bad, fair, very good"),
        ([1, 2], r"task.class_weights: has 2 weights for 3 classes"),
    ],
)
def test_weights_that_do_not_fit_the_labels(
    base: Path, tmp_path: Path, given: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        lorakit.train(weighted(tmp_path, base, given))
    assert not (tmp_path / "run").exists()


def test_what_a_recipe_cannot_have(base: Path, tmp_path: Path) -> None:
    for given, keys, message in (
        ({"worse": 2}, {"task__labels": NAMES}, "class_weights: unknown class 'worse'"),
        ("balance", {}, "task.class_weights = \"balance\""),
        ({"bad": 0}, {}, "task.class_weights"),
        ({"bad": 1e300}, {}, "task.class_weights"),
        ([1.0, float("nan"), 1.0], {}, "task.class_weights"),
        ("balanced", {"task__regression": True}, "class_weights and regression: true"),
        ("balanced", {"task__streaming": True}, "not supported with task.streaming"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            weighted(tmp_path, base, given, **keys)


def test_a_class_without_rows_has_no_balanced_weight(base: Path, tmp_path: Path) -> None:
    recipe = weighted(
        tmp_path, base, "balanced", task__labels=[*NAMES, "best"], model__new_head=True
    )
    with pytest.raises(UserError, match="no row of train has the label best"):
        lorakit.train(recipe)
