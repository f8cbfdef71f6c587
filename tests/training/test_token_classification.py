"""Tags of words: trained, scored, merged and read by PEFT and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from seqeval import metrics
from transformers import AutoModelForTokenClassification, AutoTokenizer

import lorakit
from lorakit.data.words import first_tokens
from tests.training.runs import log_lines, write_rows
from tests.training.tagged import TAGS, tagged_recipe, tagged_rows, write_word_pieces


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_word_pieces(tmp_path_factory.mktemp("pieces") / "base")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = tagged_recipe(tmp_path_factory.mktemp("tags"), base)
    return recipe, lorakit.train(recipe)


def labelled(tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    """A batch as in transformers' example of token classification."""
    words = [row["tokens"] for row in rows]
    batch = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
    labels = torch.full(batch.input_ids.shape, -100)
    for index, row in enumerate(rows):
        seen = set()
        for at, word in enumerate(batch.word_ids(index)):
            if word is not None and word not in seen:
                seen.add(word)
                labels[index, at] = TAGS.index(row["tags"][word])
    return batch, labels


def test_the_loss_is_that_of_transformers(trained: Any, base: Path, tmp_path: Path) -> None:
    """Of a step of two micro-batches, whose rows have different numbers of words, and of the
    evaluation."""
    _, run = trained
    tokenizer = AutoTokenizer.from_pretrained(base)
    start = lorakit.load(base, run.adapter_dir)
    split = tagged_recipe(
        tmp_path, base, train__max_steps=1, train__gradient_accumulation_steps=2,
        train__learning_rate=1e-9,
    )  # fmt: skip
    first = lorakit.train(split)
    model = lorakit.load(base, first.adapter_dir)
    assert type(model) is type(start)
    assert type(model).__name__ == "BertForTokenClassification"
    assert [model.config.id2label[i] for i in range(5)] == TAGS
    (line,) = log_lines(Path(split.train.output_dir))
    for rows, loss in ((tagged_rows(16), line["loss"]), (tagged_rows(6), first.metrics["loss"])):
        batch, labels = labelled(tokenizer, rows)
        with torch.no_grad():
            expected = model(**batch, labels=labels).loss
        assert loss == pytest.approx(float(expected), rel=1e-5)


def test_scores(trained: Any, base: Path, tmp_path: Path) -> None:
    recipe, run = trained
    assert list(run.metrics) == ["loss", "f1", "precision", "recall", "accuracy"]
    assert run.metrics["f1"] > 0.5
    assert lorakit.evaluate(recipe, run.adapter_dir) == pytest.approx(run.metrics, rel=1e-6)
    tokenizer, rows = AutoTokenizer.from_pretrained(base), tagged_rows(6)
    batch, labels = labelled(tokenizer, rows)
    with torch.no_grad():
        found = lorakit.load(base, run.adapter_dir)(**batch).logits.argmax(-1)
    tags = [[TAGS[int(i)] for i in row[own >= 0]] for row, own in zip(found, labels, strict=True)]
    gold = [row["tags"] for row in rows]
    assert run.metrics["f1"] == pytest.approx(metrics.f1_score(gold, tags))
    assert run.metrics["recall"] == pytest.approx(metrics.recall_score(gold, tags))


def test_peft_and_the_merged_model_give_equal_logits(
    trained: Any, base: Path, tmp_path: Path
) -> None:
    _, run = trained
    plain = AutoModelForTokenClassification.from_pretrained(base, num_labels=5)
    theirs = peft.PeftModel.from_pretrained(plain, run.adapter_dir).eval()
    assert type(theirs).__name__ == "PeftModelForTokenClassification"
    lorakit.merge(base, run.adapter_dir, tmp_path / "merged")
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.label2id == {tag: index for index, tag in enumerate(TAGS)}
    ours, tokenizer = lorakit.load_with_tokenizer(run.adapter_dir)
    again, _ = lorakit.load_with_tokenizer(tmp_path / "merged")
    batch, _ = labelled(tokenizer, tagged_rows(6))
    with torch.no_grad():
        logits = ours(**batch).logits
        for other in (theirs, merged, again):
            torch.testing.assert_close(other(**batch).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["é a  ab", "x", "日本 語\u200d"])
def test_a_byte_tokenizer_begins_words(tiny_bert: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    words = text.split(" ")
    offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping
    found = first_tokens(words, offsets).tolist()
    begun = [index for index in found if index >= 0]
    assert begun == [index for index, word in enumerate(words) if word]
    for index in begun:
        assert offsets[found.index(index)][0] == len(" ".join([*words[:index], ""]))


def test_a_truncated_row_is_scored_on_all_its_words(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["a"] * 40, "tags": ["B-X", *["O"] * 38, "B-X"]}] * 4
    for name in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    recipe = tagged_recipe(
        tmp_path, tiny_bert, task__max_length=16, train__max_steps=1, task__labels=["O", "B-X"]
    )
    run = lorakit.train(recipe)
    # 14 tokens are left: 7 letters, and 7 spaces
    assert run.metrics["accuracy"] <= 7 / 40
    assert run.metrics["recall"] <= 0.5
