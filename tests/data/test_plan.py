"""Planning which rows make a step."""

from __future__ import annotations

import numpy as np
import pytest

from lorakit.data.counts import Counts
from lorakit.data.encode import EncodedSplit
from lorakit.data.plan import IndexedSteps, Packing, Plan, RowPlan, TokenPlan

LENGTHS = np.random.default_rng(0).integers(1, 200, size=1003)


def by_rows(group: bool = True, batch: int = 4, accumulation: int = 2, seed: int = 3) -> RowPlan:
    return RowPlan(LENGTHS, batch, accumulation, seed, group)


def by_tokens(
    budget: int = 1000,
    rows: int | None = None,
    accumulation: int = 1,
    seed: int = 3,
    multiple: int = 1,
) -> TokenPlan:
    return TokenPlan(LENGTHS, budget, rows, accumulation, seed, multiple)


PLANS: dict[str, Plan] = {
    "rows": by_rows(), "mixed": by_rows(False), "tokens": by_tokens(), "both": by_tokens(rows=3),
    "accumulated": by_tokens(accumulation=3),
}  # fmt: skip


def flat(plan: Plan, epoch: int = 0) -> list[int]:
    return [int(i) for step in plan.epoch(epoch) for batch in step for i in batch]


def padded(plan: Plan) -> int:
    batches = [batch for step in plan.epoch(0) for batch in step]
    return sum(int(LENGTHS[batch].max()) * len(batch) for batch in batches)


@pytest.mark.parametrize("name", PLANS)
def test_an_epoch_has_each_row_once_and_always_as_many_steps(name: str) -> None:
    plan = PLANS[name]
    for epoch in range(3):
        assert sorted(flat(plan, epoch)) == list(range(1003))
        assert len(plan.epoch(epoch)) == plan.steps_per_epoch


@pytest.mark.parametrize("make", [by_rows, by_tokens])
def test_the_order_depends_on_seed_and_epoch_alone(make: type) -> None:
    assert flat(make()) == flat(make())
    assert flat(make()) != flat(make(seed=4))
    assert flat(make()) != flat(make(), 1)


@pytest.mark.parametrize("group", [False, True])
def test_a_steps_rows_do_not_depend_on_how_it_is_split(group: bool) -> None:
    whole, parts = by_rows(group, 8, 1).epoch(3), by_rows(group, 2, 4).epoch(3)
    for one, other in zip(whole, parts, strict=True):
        assert np.concatenate(one).tolist() == np.concatenate(other).tolist()
        assert all(len(batch) <= 2 for batch in other)


@pytest.mark.parametrize("name", ["rows", "tokens"])
def test_grouping_pads_less_and_puts_the_longest_first(name: str) -> None:
    plan = PLANS[name]
    assert padded(plan) < 1.1 * LENGTHS.sum() < padded(PLANS["mixed"])
    steps = plan.epoch(0)
    assert LENGTHS[np.concatenate(steps[0])].max() == LENGTHS.max()
    means = [LENGTHS[np.concatenate(step)].mean() for step in steps]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3, "lengths come mixed"


def test_the_budget_counts_padding() -> None:
    for multiple in (1, 8, 64):
        for step in by_tokens(multiple=multiple).epoch(0):
            (batch,) = step
            assert -(-int(LENGTHS[batch].max()) // multiple) * multiple * len(batch) <= 1000
    sizes = [len(batch) for step in by_tokens().epoch(0) for batch in step]
    assert min(sizes[:-1]) >= 5
    assert max(sizes) > 50, "short rows fill a batch too"


def test_rows_and_tokens_bound_a_batch_together() -> None:
    sizes = [len(batch) for step in by_tokens(600, rows=4).epoch(0) for batch in step]
    assert max(sizes) == 4
    assert min(sizes) <= 3


def test_fewer_rows_than_a_step() -> None:
    small = RowPlan(LENGTHS[:3], 8, 4, 0, True)
    assert small.steps_per_epoch == 1
    assert sorted(np.concatenate(small.epoch(0)[0])) == [0, 1, 2]


def split() -> EncodedSplit:
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    tokens = np.repeat(np.arange(1003), LENGTHS).astype(np.int32)
    return EncodedSplit(tokens, np.ones(len(tokens), np.bool_), offsets, None, None, Counts())


@pytest.mark.parametrize("packed", [False, True])
def test_steps_are_accessible_in_any_order(packed: bool) -> None:
    packing = Packing(LENGTHS, 256, 3) if packed else None
    plan = RowPlan(packing.bin_lengths, 5, 2, 3, False) if packing else by_rows()
    whole = IndexedSteps(split(), plan, packing)
    count = 2 * plan.steps_per_epoch + 3
    seen = [whole.step(number) for number in range(count)]
    rows = [[int(row.input_ids[0]) for row in step.rows] for step in seen]
    epoch = plan.steps_per_epoch
    for passed in (rows[:epoch], rows[epoch : 2 * epoch]):
        assert sorted(number for step in passed for number in step) == list(range(1003))
    assert rows[:epoch] != rows[epoch : 2 * epoch]
    late = IndexedSteps(split(), plan, packing)
    assert [int(row.input_ids[0]) for row in late.step(count - 1).rows] == rows[-1]
    assert seen[0].tokens == LENGTHS[rows[0]].sum()
    assert seen[0].loss_count == (LENGTHS[rows[0]] - 1).sum(), (
        "a row's first token is not predicted"
    )


def test_an_encoders_loss_is_divided_by_its_rows() -> None:
    tokens = np.zeros(5, np.int32)
    encoder = EncodedSplit(tokens, tokens > 0, np.asarray([0, 3, 5]), None, (0, 1), Counts())
    assert IndexedSteps(encoder, RowPlan(encoder.lengths, 2, 1, 0, True)).step(0).loss_count == 2
