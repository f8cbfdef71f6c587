"""Weights of trained tokens, from the messages of a chat to the tensors of a batch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from lorakit.data.cache import EncodedCache, Shard, read_arrays, write_arrays
from lorakit.data.chat import encode_chat
from lorakit.data.collate import CausalBatch, collate_causal, collate_documents, collate_packed
from lorakit.data.counts import Counts
from lorakit.data.encode import EncodedRow, EncodedSplit, encode_split
from lorakit.data.examples import ChatExample
from lorakit.data.plan import Share, Step
from lorakit.data.sources import Split
from lorakit.data.texts import TokenRow
from lorakit.data.tokens import EncodedRows

CHAT = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "bc"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def example(row: dict[str, Any]) -> ChatExample:
    return ChatExample(CHAT, weights=row["weights"])


def encoded(tokenizer: Any, *weights: Any, max_length: int = 64, **options: Any) -> EncodedSplit:
    split = Split("train", [{"weights": each} for each in weights], "rows", "0")
    return encode_split(split, example, tokenizer, max_length, **options)


def test_the_tokens_of_a_turn_have_its_weight(tokenizer: Any) -> None:
    (row,) = encode_chat(ChatExample(CHAT, None, None, False, (1, 0.25, 1, 3.0)), tokenizer).rows
    assert row.turns == (1, 3)
    weights = np.array(row.loss_weights)
    assert weights[weights > 0].tolist() == [0.25] * 3 + [3.0] * 2
    assert [weight > 0 for weight in row.loss_weights] == row.loss_mask
    (plain,) = encode_chat(ChatExample(CHAT), tokenizer).rows
    assert (plain.input_ids, plain.loss_mask) == (row.input_ids, row.loss_mask)


def test_turns_in_rows_of_their_own_keep_their_weights(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ loop.length - loop.index0 if m.role == 'user' }}"
        "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    first, second = encode_chat(ChatExample(CHAT, weights=(1, 0.5, 1, 2.0)), tokenizer).rows
    assert {*first.loss_weights} == {0, 0.5}
    assert {*second.loss_weights} == {0, 2.0}


def test_a_split_without_weights_stores_none(tokenizer: Any) -> None:
    assert encoded(tokenizer, None, (1, 1, 1, 1)).loss_weights is None


def test_rows_with_and_without_weights(tokenizer: Any) -> None:
    split = encoded(tokenizer, None, (1, 0.25, 1, 3.0))
    assert split.trained_counts.tolist() == [5, 5]
    assert split.loss_counts.tolist() == [5.0, 6.75]
    assert split[0].loss_weights is not None
    np.testing.assert_array_equal(split[0].loss_weights, split[0].loss_mask)


def test_a_truncated_row_keeps_its_weights(tokenizer: Any) -> None:
    whole = encoded(tokenizer, (1, 0.25, 1, 3.0))[0]
    cut = encoded(tokenizer, (1, 0.25, 1, 3.0), max_length=len(whole.input_ids) - 1)[0]
    assert cut.loss_weights is not None
    assert whole.loss_weights is not None
    assert cut.loss_weights.tolist() == whole.loss_weights[:-1].tolist()


@pytest.mark.parametrize("first", [0, 1999])
def test_cached_weights(first: int, tokenizer: Any, tmp_path: Path) -> None:
    """Also if they begin in a later batch of rows."""
    weights: list[Any] = [None] * 2000
    weights[first] = (1, 0.25, 1, 3.0)
    said: list[str] = []
    stored, read = (
        encoded(tokenizer, *weights, cache=EncodedCache("key", said.append, True, tmp_path))
        for _ in range(2)
    )
    assert "read from the cache" in said[-1]
    for split in (stored, read):
        assert split.loss_weights is not None
        assert split.loss_weights.dtype == np.float32
        assert split.loss_counts.sum() == 5 * 1999 + 6.75
        assert split.loss_counts[first] == 6.75


def test_shards_with_and_without_weights() -> None:
    """Several processes write one shard each."""
    shards = [Shard.empty(in_memory=True) for _ in range(3)]
    for shard, weights in zip(shards, (None, [0, 3.0], None), strict=True):
        mask = np.array([False, True])
        given = None if weights is None else np.array(weights, np.float32)
        rows = [TokenRow(np.array([1, 2], np.int32), mask, loss_weights=given)]
        encoded = EncodedRows(rows=rows, origins=[0], labels=[], counts=Counts(rows=1))
        shard.append(encoded, "<i4", start=0)
    file = io.BytesIO()
    write_arrays(shards, file)
    arrays, _ = read_arrays(file)
    assert arrays["loss_weights"].tolist() == [0, 1, 0, 3, 0, 1]


def row(ids: list[int], weights: list[float] | None) -> EncodedRow:
    mask = np.ones(len(ids), np.bool_) if weights is None else np.asarray(weights) > 0
    given = None if weights is None else np.asarray(weights, np.float32)
    return EncodedRow(np.asarray(ids, np.int32), mask, loss_weights=given)


ROWS = [row([5, 6, 7], [9, 0, 0.5]), row([8, 9], None), row([1, 2, 3], [0, 2, 4])]


@pytest.mark.parametrize("collate", ["causal", "packed", "documents"])
def test_a_batch_has_the_weights_of_its_targets(collate: str) -> None:
    bins = [ROWS[:2], ROWS[2:]]
    batch: CausalBatch = {
        "causal": lambda: collate_causal(ROWS, 0),
        "packed": lambda: collate_packed(bins, 0),
        "documents": lambda: collate_documents(bins, 0),
    }[collate]()
    assert batch.targets.tolist() == [7, 9, 2, 3]
    assert batch.weights is not None
    assert batch.weights.tolist() == [0.5, 1, 2, 4]
    assert batch.loss_count == 7.5
    assert "weights" in batch.tensors()
    assert "weights" not in collate_causal(ROWS[1:2], 0).tensors()


def test_a_step_counts_weights_and_tokens() -> None:
    step = Step([[ROWS[:2]], [ROWS[2:]]], 7.5, 8, 4)
    assert Step.of([[ROWS[:2]], [ROWS[2:]]], share=Share()) == step
