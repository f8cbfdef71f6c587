from __future__ import annotations

import numpy as np
import torch

from lorakit.data.collate import (
    collate_causal,
    collate_documents,
    collate_encoder,
    collate_packed,
    eval_batches,
)
from lorakit.data.encode import EncodedRow

LENGTHS = np.random.default_rng(0).integers(1, 200, 997)


def test_evaluation_batches_have_every_row_once_longest_first() -> None:
    parts = list(eval_batches(LENGTHS, 16))
    assert sorted(np.concatenate(parts).tolist()) == list(range(997))
    lengths = LENGTHS[np.concatenate(parts)]
    assert (np.diff(lengths) <= 0).all()


def row(ids: list[int], loss_mask: list[int], types: list[int] | None = None) -> EncodedRow:
    return EncodedRow(
        np.asarray(ids, np.int32),
        np.asarray(loss_mask, np.bool_),
        None if types is None else np.asarray(types, np.int8),
        1,
    )


def test_causal_batch() -> None:
    rows = [row([5, 6, 7], [0, 1, 1]), row([8, 9], [1, 0]), row([1, 2, 3, 4], [0, 0, 0, 1])]
    batch = collate_causal(rows, pad_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 99], [8, 9, 99, 99], [1, 2, 3, 4]]
    # Row 0 predicts its tokens 1 and 2; row 1's first token has none before it; row 2 its last.
    assert batch.loss_indices.tolist() == [0, 1, 10]
    assert batch.targets.tolist() == [6, 7, 4]
    assert {tensor.dtype for tensor in batch.tensors().values()} == {torch.int64}
    wide = collate_causal(rows, pad_id=99, multiple_of=8)
    assert wide.input_ids.shape == (3, 8)
    assert wide.loss_indices.tolist() == [0, 1, 18]
    assert wide.targets.tolist() == [6, 7, 4]
    flat = wide.input_ids.flatten()
    assert flat[wide.loss_indices + 1].tolist() == wide.targets.tolist()


def test_encoder_batch() -> None:
    rows = [row([2, 5, 3], [0] * 3, [0, 0, 1]), row([2, 3], [0] * 2, [0, 0])]
    batch = collate_encoder(rows, pad_id=7, multiple_of=4)
    assert batch.input_ids.tolist() == [[2, 5, 3, 7], [2, 3, 7, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch.token_type_ids.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    assert batch.labels.tolist() == [1, 1]
    bare = collate_encoder([row([2], [0])], pad_id=7)
    assert set(bare.tensors()) == {"input_ids", "labels"}, "nothing is padded, so nothing is masked"


ROWS = [
    row([5, 6, 7], [0, 1, 1]),
    row([8, 9], [1, 1]),
    row([1], [1]),
    row([2, 3, 4, 5], [0, 0, 1, 1]),
]


def test_packed_batch() -> None:
    batch = collate_packed([[ROWS[0], ROWS[1]], [ROWS[2], ROWS[3]]], pad_id=99, multiple_of=4)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 99, 99, 99], [1, 2, 3, 4, 5, 99, 99, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 0, 1, 2]]
    # No row's first token is predicted from the row before it.
    assert batch.loss_indices.tolist() == [0, 1, 3, 8 + 2, 8 + 3]
    assert batch.targets.tolist() == [6, 7, 9, 4, 5]
    assert {tensor.dtype for tensor in batch.tensors().values()} == {torch.int64}


def test_documents_in_one_sequence() -> None:
    batch = collate_documents([[ROWS[0], ROWS[1]], [ROWS[2], ROWS[3]]], pad_id=99, multiple_of=4)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 99, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 0, 1]]
    assert batch.loss_indices.tolist() == [0, 1, 3, 6 + 1, 6 + 2]
    assert batch.targets.tolist() == [6, 7, 9, 4, 5]
    assert batch.cu_seq_lens.tolist() == [0, 3, 5, 6, 10, 12]
    assert batch.cu_seq_lens.dtype == torch.int32
    whole = collate_documents([ROWS], pad_id=99, multiple_of=5)
    assert whole.cu_seq_lens.tolist() == [0, 3, 5, 6, 10], "nothing is padded"
