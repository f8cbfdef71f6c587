"""Which rows make a step."""

from __future__ import annotations

import numpy as np
import pytest

from lorakit.data.batches import StepPlan, StepReader

LENGTHS = np.random.default_rng(0).integers(1, 200, size=1003)


def plan(group: bool = True, batch: int = 4, accumulation: int = 2, **more: int) -> StepPlan:
    settings = {"processes": 1, "seed": 3} | more
    return StepPlan(LENGTHS, batch, accumulation, group_by_length=group, **settings)


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_has_each_row_once(group: bool, epoch: int) -> None:
    steps = plan(group).epoch(epoch)
    assert len(steps) == plan(group).steps_per_epoch == 126
    assert sorted(np.concatenate(steps)) == list(range(1003))
    assert sorted(len(rows) for rows in steps) == [3] + [8] * 125


@pytest.mark.parametrize("group", [False, True])
def test_the_order_is_of_seed_and_epoch_alone(group: bool) -> None:
    def order(**more: int) -> list[int]:
        epoch = more.pop("epoch", 0)
        return [int(i) for rows in plan(group, **more).epoch(epoch) for i in rows]

    assert order() == order()
    assert order() != order(seed=4)
    assert order() != order(epoch=1)
    assert order() == order(batch=8, accumulation=1), "how a step is cut changes no step"


def test_resuming_in_the_middle_reads_the_same_rows() -> None:
    whole = StepReader(plan())
    rows = [whole.rows(step).tolist() for step in range(300)]
    late = StepReader(plan())
    assert [late.rows(step).tolist() for step in range(200, 300)] == rows[200:]
    assert StepReader(plan()).rows(130).tolist() == rows[130]


def test_micro_batches_are_the_step() -> None:
    rows = plan().epoch(0)[5]
    pieces = plan().micro_batches(rows)
    assert [len(piece) for piece in pieces] == [4, 4]
    assert np.concatenate(pieces).tolist() == rows.tolist()
    assert [len(piece) for piece in plan().micro_batches(rows[:5])] == [4, 1]


def test_processes_share_a_step() -> None:
    shared = plan(processes=3, batch=4, accumulation=2)
    assert shared.rows_per_step == 24
    rows = shared.epoch(0)[0]
    parts = [np.concatenate(shared.micro_batches(rows, process)) for process in range(3)]
    assert sorted(np.concatenate(parts)) == sorted(rows)
    assert all(len(part) == 8 for part in parts)


def test_grouping_pads_less_and_puts_the_longest_first() -> None:
    def padded(steps: list[np.ndarray]) -> int:
        return sum(int(LENGTHS[rows].max()) * len(rows) for rows in steps)

    grouped, shuffled = plan(True).epoch(0), plan(False).epoch(0)
    assert padded(grouped) < 1.1 * LENGTHS.sum() < padded(shuffled)
    assert LENGTHS[grouped[0]].max() == LENGTHS.max()
    means = [LENGTHS[rows].mean() for rows in grouped]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3, "lengths come mixed"


def test_fewer_rows_than_a_step() -> None:
    small = StepPlan(LENGTHS[:3], 8, 4, 1, 0, True)
    assert small.steps_per_epoch == 1
    assert sorted(small.epoch(0)[0]) == [0, 1, 2]
