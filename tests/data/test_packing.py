"""Bins of rows."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lorakit.data.packing import Packing, first_fit_decreasing


def one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """First fit decreasing as the textbook has it."""
    room: list[int] = []
    placed = []
    for length in sorted(lengths, reverse=True):
        found = next((i for i, left in enumerate(room) if left >= length), len(room))
        if found == len(room):
            room.append(capacity)
        room[found] -= length
        placed.append(found)
    return placed


@pytest.mark.parametrize("seed", range(20))
def test_first_fit_decreasing_is_the_textbooks(seed: int) -> None:
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(5, 60))
    lengths = generator.integers(1, capacity + 1, size=int(generator.integers(1, 300)))
    assert first_fit_decreasing(lengths, capacity).tolist() == one_by_one(
        lengths.tolist(), capacity
    )


def test_bins_hold_every_row_once_and_no_more_than_their_capacity() -> None:
    lengths = np.random.default_rng(1).integers(20, 150, size=5000)
    packing = Packing(lengths, 512, seed=7)
    epochs = []
    for number in range(2):
        bins = packing.epoch(number)
        rows = [bins[i] for i in range(len(packing))]
        assert sorted(np.concatenate(rows)) == list(range(5000))
        sums = [int(lengths[r].sum()) for r in rows]
        assert sums == packing.bin_lengths.tolist()
        assert max(sums) <= 512
        epochs.append([r.tolist() for r in rows])
    assert epochs[0] != epochs[1], "other rows of the same lengths"
    assert Packing(lengths, 512, seed=7).epoch(1)[3].tolist() == epochs[1][3]
    assert packing.fill == pytest.approx(lengths.sum() / (len(packing) * 512))
    assert packing.fill > 0.98


def test_a_million_rows_are_packed_in_seconds() -> None:
    lengths = np.random.default_rng(2).integers(10, 2048, size=1_000_000)
    began = time.process_time()
    packing = Packing(lengths, 2048, 0)
    assert time.process_time() - began < 30
    assert packing.fill > 0.98
