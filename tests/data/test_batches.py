from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lorakit.data.batches import (
    StepPlan,
    StepReader,
    collate_causal,
    collate_encoder,
    eval_batches,
    trained_count,
)
from lorakit.data.encode import EncodedRow, EncodedSplit

LENGTHS = np.random.default_rng(0).integers(1, 200, 997)


def plan(
    batch: int = 8, steps: int = 1, processes: int = 1, seed: int = 1, grouped: bool = True,
    lengths: NDArray[np.int64] = LENGTHS,
) -> StepPlan:  # fmt: skip
    return StepPlan(lengths, batch, steps, processes, seed, grouped)


def padding(parts: list[NDArray[np.int64]]) -> int:
    return sum(int(LENGTHS[part].max() * len(part) - LENGTHS[part].sum()) for part in parts)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("batch", [1, 8, 997, 2000])
def test_an_epoch_takes_every_row_once(grouped: bool, batch: int) -> None:
    steps = plan(batch, grouped=grouped).epoch(0)
    assert sorted(np.concatenate(steps).tolist()) == list(range(997))
    assert len(steps) == plan(batch).steps_per_epoch == -(-997 // batch)
    assert all(len(step) <= batch for step in steps)
    assert sum(len(step) < batch for step in steps) <= 1


def test_order_follows_seed_and_epoch_alone() -> None:
    def order(**changes: int) -> list[int]:
        epoch = changes.pop("epoch", 0)
        return np.concatenate(plan(**changes).epoch(epoch)).tolist()  # type: ignore[arg-type]

    assert order() == order()
    assert order() != order(seed=2)
    assert order() != order(epoch=1)


@pytest.mark.parametrize("grouped", [True, False])
def test_a_steps_rows_do_not_depend_on_how_it_is_split(grouped: bool) -> None:
    for other in (plan(2, 4, grouped=grouped), plan(2, 2, 2, grouped=grouped)):
        for a, b in zip(plan(8, grouped=grouped).epoch(3), other.epoch(3), strict=True):
            assert a.tolist() == b.tolist()


def test_micro_batches_are_a_partition() -> None:
    split = plan(3, 2, 2)
    for rows in split.epoch(0):
        shares = [split.micro_batches(rows, process) for process in range(2)]
        assert sorted(np.concatenate([*shares[0], *shares[1]]).tolist()) == sorted(rows.tolist())
        assert all(1 <= len(part) <= 3 for share in shares for part in share)


def test_no_process_is_left_without_a_row() -> None:
    short = plan(2, 1, 4, lengths=LENGTHS[:11])  # 11 = 8 + 3: the last 3 rows feed no 4 processes
    assert short.steps_per_epoch == 1
    assert [len(step) for step in short.epoch(0)] == [8]
    assert plan(2, 1, 4, lengths=LENGTHS[:12]).steps_per_epoch == 2
    assert plan(2, 1, 4, lengths=LENGTHS[:3]).steps_per_epoch == 0


def test_grouping_by_length_saves_padding_and_starts_with_the_longest() -> None:
    grouped, mixed = plan(8).epoch(0), plan(8, grouped=False).epoch(0)
    assert padding(grouped) < padding(mixed) / 5
    assert LENGTHS[grouped[0]].max() == LENGTHS.max()
    firsts = [int(LENGTHS[step].max()) for step in grouped[1:]]
    assert firsts != sorted(firsts, reverse=True)


def test_steps_are_read_across_epochs_and_from_anywhere() -> None:
    three = plan(400)
    reader = StepReader(three)
    wanted = [step for epoch in range(3) for step in three.epoch(epoch)]
    assert all(reader.rows(i).tolist() == step.tolist() for i, step in enumerate(wanted))
    assert StepReader(three).rows(7).tolist() == wanted[7].tolist()


def test_evaluation_takes_every_row_once_the_longest_first() -> None:
    parts = list(eval_batches(LENGTHS, 16))
    assert sorted(np.concatenate(parts).tolist()) == list(range(997))
    lengths = LENGTHS[np.concatenate(parts)]
    assert (np.diff(lengths) <= 0).all()


def row(ids: list[int], trained: list[int], types: list[int] | None = None) -> EncodedRow:
    return EncodedRow(
        np.asarray(ids, np.int32),
        np.asarray(trained, np.bool_),
        None if types is None else np.asarray(types, np.int8),
        1,
    )


def test_causal_batch() -> None:
    rows = [row([5, 6, 7], [0, 1, 1]), row([8, 9], [1, 0]), row([1, 2, 3, 4], [0, 0, 0, 1])]
    batch = collate_causal(rows, pad_id=99)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 99], [8, 9, 99, 99], [1, 2, 3, 4]]
    # Row 0 predicts its tokens 1 and 2; row 1's first token has none before it; row 2 its last.
    assert batch["positions"].tolist() == [0, 1, 10]
    assert batch["targets"].tolist() == [6, 7, 4]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    wide = collate_causal(rows, pad_id=99, multiple_of=8)
    assert wide["input_ids"].shape == (3, 8)
    assert wide["positions"].tolist() == [0, 1, 18]
    assert wide["targets"].tolist() == [6, 7, 4]
    flat = wide["input_ids"].flatten()
    assert flat[wide["positions"] + 1].tolist() == wide["targets"].tolist()


def test_encoder_batch() -> None:
    rows = [row([2, 5, 3], [0] * 3, [0, 0, 1]), row([2, 3], [0] * 2, [0, 0])]
    batch = collate_encoder(rows, pad_id=7, multiple_of=4)
    assert batch["input_ids"].tolist() == [[2, 5, 3, 7], [2, 3, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    assert batch["labels"].tolist() == [1, 1]
    bare = collate_encoder([row([2], [0])], pad_id=7)
    assert set(bare) == {"input_ids", "labels"}, "nothing is padded, so nothing is masked"


def test_what_a_steps_loss_is_divided_by() -> None:
    rows = [row([5, 6, 7], [1, 1, 1]), row([8, 9], [0, 1])]
    offsets = np.asarray([0, 3, 5])
    tokens = np.concatenate([r.input_ids for r in rows])
    trained = np.concatenate([r.trained for r in rows])
    causal = EncodedSplit(tokens, trained, offsets, None, None, 0, 0)
    assert [trained_count(causal, np.asarray(i)) for i in ([0], [1], [0, 1])] == [2, 1, 3]
    assert causal.trained_tokens == 3
    encoder = EncodedSplit(tokens, trained, offsets, None, (0, 1), 0, 0)
    assert trained_count(encoder, np.asarray([0, 1])) == 2
