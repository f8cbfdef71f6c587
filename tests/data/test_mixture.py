"""Mixtures: how many rows of each source an epoch draws, and which."""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.data.counts import Counts
from lorakit.data.encode import EncodedSplit
from lorakit.data.mixture import MixedSteps, Mixture, epoch_rows, weights_note
from lorakit.data.plan import Packing, RowPlan, Share, TokenPlan
from lorakit.data.shares import apportion, interleaved
from lorakit.data.sources import SourceRows, load_split
from lorakit.data.stream import open_stream
from lorakit.data.stream_steps import shuffled
from lorakit.errors import DataError
from lorakit.recipe.data_path import DataSource


def sources(*rows_and_weights: tuple[int, float]) -> list[SourceRows]:
    return [SourceRows("abcdef"[i], n, w) for i, (n, w) in enumerate(rows_and_weights)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (((1000, 1), (1000, 2), (1000, 5)), [200, 400, 1000]),
        (((100, 1), (1000, 1)), [100, 100]),
        (((100, 0.1), (200, 0.2), (700, 0.7)), [100, 200, 700]),
        (((3, 1), (100, 2.5)), [3, 7]),  # 7.5 rows of b
        (((10, 1), (2, 3)), [1, 2]),
        (((10, 1e300), (10, 1e300)), [10, 10]),
        (((7, 3),), [7]),
    ],
)
def test_rows_of_an_epoch(given: Any, expected: list[int]) -> None:
    assert epoch_rows(sources(*given)) == expected


@pytest.mark.parametrize("seed", range(20))
def test_an_epoch_ends_with_the_first_source_that_ends(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, weights = generator.integers(10, 99, 3), generator.uniform(0.1, 1, 3)
    counts = epoch_rows(sources(*zip(rows.tolist(), weights.tolist(), strict=True)))
    exact = sum(counts) * weights / weights.sum()
    assert (np.abs(counts - exact) < 1).all()
    assert (rows - counts).min() in (0, 1)


def test_a_weight_of_less_than_a_row() -> None:
    with pytest.raises(DataError) as caught:
        epoch_rows(sources((1000, 1), (10, 100)))
    assert str(caught.value) == (
        "task.path: weight 1 of a: an epoch ends with all 10 rows of b (weight 100), before it "
        "draws one row; allowed: at least 10"
    )
    assert epoch_rows(sources((1000, 10), (10, 100))) == [1, 10]


def test_many_shares_are_divided_in_linear_time() -> None:
    start = time.process_time()
    assert apportion(10_000, range(1, 20_001))[-1] == 1
    assert time.process_time() - start < 2


def test_shares_are_divided_exactly() -> None:
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(1000, [0.1, 0.2, 0.7]) == [100, 200, 700]
    order = list(islice(interleaved([1, 2, 5]), 80))
    for start in range(0, 80, 8):
        assert Counter(order[start : start + 8]) == {0: 1, 1: 2, 2: 5}
    assert list(islice(interleaved([0.5, 0.25]), 6)) == [0, 1, 0, 0, 1, 0]


def test_every_epoch_goes_on_where_the_last_one_stopped() -> None:
    mixture = Mixture(sources((40, 1), (10, 1), (60, 3)), seed=1)
    assert mixture.counts == [10, 10, 30]
    epochs = [mixture.epoch(number) for number in range(4)]
    for drawn in epochs:
        assert len(set(drawn.tolist())) == 50
        assert np.bincount(np.digitize(drawn, [40, 50])).tolist() == [10, 10, 30]
    assert sorted(np.concatenate(epochs)[np.concatenate(epochs) < 40].tolist()) == list(range(40))
    again = Mixture(sources((40, 1), (10, 1), (60, 3)), seed=1)
    assert np.array_equal(again.epoch(3), epochs[3])
    other = Mixture(sources((40, 1), (10, 1), (60, 3)), seed=2)
    assert not np.array_equal(other.epoch(3), epochs[3])


def rows_of_lengths(lengths: Any) -> EncodedSplit:
    tokens = np.ones(int(lengths.sum()), np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return EncodedSplit(tokens, tokens > 0, offsets, None, None, Counts())


def planned(kind: str, lengths: Any) -> Any:
    if kind == "tokens":
        return TokenPlan(lengths, 24, None, 2, seed=3), None
    packing = Packing(lengths, 32, seed=3) if kind == "packed" else None
    return RowPlan(packing.bin_lengths if packing else lengths, 4, 2, 3, kind == "rows"), packing


@pytest.mark.parametrize("kind", ["rows", "packed", "tokens"])
def test_steps_have_the_rows_of_each_epoch(kind: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 24, 110)
    mixture = Mixture(sources((40, 1), (10, 1), (60, 3)), seed=3)
    rows = rows_of_lengths(lengths)

    def steps() -> MixedSteps:
        return MixedSteps(rows, mixture, partial(planned, kind), Share())

    whole, number = steps(), 0
    for epoch in range(3):
        drawn: list[int] = []
        while len(drawn) < 50:
            batches = whole.row_numbers(number)
            drawn += [int(i) for batch in batches for unit in batch for i in unit]
            resumed = steps().row_numbers(number)
            assert str(resumed) == str(batches)
            number += 1
        assert sorted(drawn) == sorted(mixture.epoch(epoch).tolist())
        assert epoch or number == whole.steps_per_epoch
    parts = [MixedSteps(rows, mixture, partial(planned, kind), Share(r, 2)).step(9) for r in (0, 1)]
    alone = whole.step(9)
    assert len(alone.micro_batches) == sum(len(part.micro_batches) for part in parts)
    assert {part.loss_count for part in parts} == {alone.loss_count}


def files(folder: Path) -> list[DataSource]:
    found = []
    for name, rows, weight in (("a", 30, 1), ("b", 20, 2), ("c", 40, 5)):
        lines = [json.dumps({"text": f"{name}{n}"}) for n in range(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        found.append(DataSource(path=str(folder / f"{name}.jsonl"), weight=weight))
    return found


def test_a_split_of_weighted_files(tmp_path: Path) -> None:
    path = files(tmp_path)
    found = load_split([*path], "train")
    plain = load_split([str(source.path) for source in path], "train")
    assert found is not None
    assert plain is not None
    assert list(found.rows) == list(plain.rows)
    assert (found.fingerprint, plain.sources) == (plain.fingerprint, ())
    assert [s.rows for s in found.sources] == [30, 20, 40]
    assert weights_note("train", None, found.sources) == (
        f"train: an epoch draws 64 rows by weight: 8 of 30 from {tmp_path}/a.jsonl (12.5%), 16 of "
        f"20 from {tmp_path}/b.jsonl (25.0%), 40 of 40 from {tmp_path}/c.jsonl (62.5%)"
    )
    other = load_split([path[0], path[1], str(path[2].path)], "train")
    assert other is not None
    assert [s.weight for s in other.sources] == [1, 2, 1]
    assert len({split.identity for split in (found, plain, other)}) == 3
    few = load_split([*path], "train", limit=16)
    assert few is not None
    assert [s.rows for s in few.sources] == [2, 4, 10]
    assert few.rows[2] == {"text": "b0"}


def test_the_identity_depends_on_the_rows_of_each_source(tmp_path: Path) -> None:
    a, b, c = (str(source.path) for source in files(tmp_path))
    first = load_split([DataSource(path=[a, b], weight=1), DataSource(path=c, weight=2)], "train")
    second = load_split([DataSource(path=a, weight=1), DataSource(path=[b, c], weight=2)], "train")
    assert first is not None
    assert second is not None
    assert first.fingerprint == second.fingerprint
    assert first.identity != second.identity


def test_notes_are_about_the_files_of_all_sources(tmp_path: Path) -> None:
    shards = [tmp_path / f"x-{n}-of-3.jsonl" for n in range(3)]
    for shard in shards:
        shard.write_text('{"text": "x"}\n')
    train = [DataSource(path=str(shard), weight=1) for shard in shards]
    found = load_split({"train": [*train], "dev": str(shards[1])}, "train")
    assert found is not None
    assert found.notes == (f"task.path: in both train and dev: {shards[1]}",)
    found = load_split([*train[:2]], "train")
    assert found is not None
    assert found.notes == (f"task.path: shards not listed: {shards[2]}",)


def test_a_source_that_cannot_be_read() -> None:
    with pytest.raises(DataError, match=r"^task\.path: cannot be read: .*File name too long"):
        load_split([DataSource(path="a" * 300, weight=1)], "train")


def test_only_training_rows_are_weighted(tmp_path: Path) -> None:
    for name, rows in (("a", 4), ("b", 1)):
        (tmp_path / name).mkdir()
        for split in ("train", "dev"):
            (tmp_path / name / f"{split}.jsonl").write_text('{"text": "x"}\n' * rows)
    path = [DataSource(path=str(tmp_path / name), weight=2) for name in ("a", "b")]
    for split, rows in (("train", [4, 1]), ("validation", [])):
        found = load_split([*path], split)
        assert found is not None
        assert [source.rows for source in found.sources] == rows
        assert len(found) == 5


def test_sources_that_cannot_be_mixed(tmp_path: Path) -> None:
    path = files(tmp_path)
    with pytest.raises(DataError, match="duplicate file"):
        load_split([*path, str(path[0].path)], "train")
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"b\.jsonl: the source has no rows"):
        load_split([*path], "train")


def test_a_stream_of_weighted_files(tmp_path: Path) -> None:
    stream = open_stream([*files(tmp_path)], "train")
    assert stream is not None
    rows = list(islice(shuffled(stream, seed=1, buffer_rows=16), 320))
    texts = [row.located.row["text"] for row in rows]
    for start in range(0, 320, 8):
        assert Counter(text[0] for text in texts[start : start + 8]) == {"a": 1, "b": 2, "c": 5}
    seen = {name: [text for text in texts if text[0] == name] for name in "abc"}
    assert len(set(seen["a"][:30])) == 30
    assert sorted(seen["c"][:40]) == sorted(seen["c"][40:80]) != seen["c"][:40]
    assert {row.number for row in rows if row.located.row["text"][0] == "c"} == {0, 1, 2, 3, 4}
    assert [row.located.row for row in shuffled_again(stream)] != texts[:10]
    limited = open_stream([*files(tmp_path)], "train", limit=16)
    assert limited is not None
    assert Counter(row.row["text"][0] for row in limited.read()) == {"a": 2, "b": 4, "c": 10}


def shuffled_again(stream: Any) -> Any:
    return islice(shuffled(stream, seed=2, buffer_rows=16), 10)


def test_the_fingerprint_of_a_stream_depends_on_the_weights(tmp_path: Path) -> None:
    a, b, c = files(tmp_path)
    paths: list[Any] = [
        [a, b, c],
        [a, b, c.model_copy(update={"weight": 4})],
        [str(x.path) for x in (a, b, c)],
    ]
    prints = {open_stream(path, "train").head.fingerprint for path in paths}  # type: ignore[union-attr]
    assert len(prints) == 3
