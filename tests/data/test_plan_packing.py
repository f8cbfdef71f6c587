"""Packing rows into bins."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from lorakit import registry
from lorakit.data.encode import encode_split
from lorakit.data.plan import Packing, first_fit_decreasing
from lorakit.models.hub import load_tokenizer


@pytest.mark.parametrize("seed", range(20))
def test_no_worse_than_plain_first_fit_decreasing(seed: int) -> None:
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(20, 600))
    lengths = generator.integers(1, capacity // 2 + 2, size=int(generator.integers(100, 600)))
    bins = first_fit_decreasing(lengths, capacity)
    fill = np.bincount(bins, np.sort(lengths)[::-1])
    assert fill.sum() == lengths.sum()
    assert fill.max() <= capacity
    assert len(fill) <= textbook(lengths.tolist(), capacity) + 1


def textbook(lengths: list[int], capacity: int) -> int:
    """The number of bins that it opens."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        found = next((i for i, left in enumerate(room) if left >= length), len(room))
        if found == len(room):
            room.append(capacity)
        room[found] -= length
    return len(room)


@pytest.mark.parametrize(("lengths", "bins"), [
    ([5, 5, 5], [0, 0, 1]), ([10, 1, 9], [0, 1, 1]), ([7, 6, 3, 4], [0, 1, 1, 0]), ([1], [0]),
    ([5, 4, 3, 3, 3, 2], [0, 1, 0, 1, 1, 0]),
])  # fmt: skip
def test_small_bins_of_ten(lengths: list[int], bins: list[int]) -> None:
    """For rows in order of decreasing length."""
    assert first_fit_decreasing(np.asarray(lengths), 10).tolist() == bins


def test_bins_have_every_row_once_and_respect_the_capacity() -> None:
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


def test_many_rows_are_packed_in_seconds() -> None:
    lengths = np.random.default_rng(2).integers(10, 2048, size=50_000)
    began = time.process_time()
    packing = Packing(lengths, 2048, 0)
    assert time.process_time() - began < 15
    assert packing.fill > 0.98


def test_the_real_rows_of_wikisql_fill_their_bins(data_dir: Path, smollm2: Path) -> None:
    """At the default length, which is less than six times that of the longest rows."""
    task = registry.task("wikisql")
    config = task.Config(name="wikisql", path=str(data_dir / "wikisql"))
    split = task.load(config, "validation")
    tokenizer, _ = load_tokenizer(str(smollm2), {})
    rows = encode_split(split, lambda row: task.example(row, config), tokenizer, config.max_length)
    assert Packing(rows.lengths, config.max_length, 0).fill > 0.98
