"""Splits of some rows of another, and the choice of held-out rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.rows import row_range
from lorakit.data.selection import held_out, select
from lorakit.data.sources import Split, load_split
from lorakit.errors import DataError
from lorakit.recipe.data_path import DataSource


def write(file: Path, rows: range) -> str:
    lines = [json.dumps({"n": n}) for n in rows]
    if file.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list([json.loads(line) for line in lines]).to_parquet(file)
    else:
        file.write_text("\n".join(lines))
    return str(file)


def loaded(path: Any) -> Split:
    found = load_split(path, "train")
    assert found is not None
    return found


@pytest.mark.parametrize(
    "suffixes", [("jsonl", "jsonl"), ("parquet", "parquet"), ("jsonl", "parquet")]
)
def test_rows_keep_their_place_in_the_files(tmp_path: Path, suffixes: tuple[str, str]) -> None:
    a, b = (
        write(tmp_path / f"{n}.{s}", range(10 * n, 10 * n + 10)) for n, s in enumerate(suffixes)
    )
    whole = loaded([a, b])
    part = select(whole, [1, 8, 10, 19], "validation")
    assert [row["n"] for row in part.rows] == part.column("n") == [1, 8, 10, 19]
    assert (part.name, part.columns, len(part)) == ("validation", ("n",), 4)
    where = [f"{a}, row 2", f"{a}, row 9", f"{b}, row 1", f"{b}, row 10"]
    assert [part.locate(index) for index in range(4)] == where
    assert [count for _, count in part.files] == [2, 2]
    again = select(part, range(1, 3), "validation")
    assert [again.locate(index) for index in range(2)] == where[1:3]
    assert [row["n"] for row in row_range(again.rows, 0, 2)] == [8, 10]
    prints = {split.fingerprint for split in (whole, part, again, select(whole, [1, 8], "train"))}
    assert len(prints) == 4
    assert select(whole, [1, 8, 10, 19], "train").fingerprint == part.fingerprint


def test_sources_of_a_part(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{n}.jsonl", range(5)) for n in range(2)]
    whole = loaded([DataSource(path=name, weight=2) for name in names])
    part = select(whole, [0, 1, 2, 3, 5], "train")
    assert [(source.rows, source.weight) for source in part.sources] == [(4, 2.0), (1, 2.0)]
    with pytest.raises(DataError, match=r"1\.jsonl: the source has no rows"):
        select(whole, [0, 1], "train")


def test_each_key_has_the_share() -> None:
    names = ["a"] * 100 + ["b"] * 40 + ["c"] * 7 + ["d"]
    keys = {index: (0, name) for index, name in enumerate(names)}
    chosen = held_out(0.1, keys, seed=0)
    assert chosen == sorted(set(chosen))
    assert Counter(names[index] for index in chosen) == {"a": 10, "b": 4, "c": 1}
    assert chosen == held_out(0.1, keys, seed=0)
    assert chosen != held_out(0.1, keys, seed=1)
    assert held_out(0.9, {0: (0, "a"), 1: (1, "a")}, seed=0) == []
    assert held_out(0.01, dict.fromkeys(range(20), (0, "a")), seed=0) == []
    even = held_out(0.2, {index: keys[index] for index in keys if index % 2 == 0}, seed=0)
    assert Counter(names[index] for index in even) == {"a": 10, "b": 4, "c": 1}
    assert all(index % 2 == 0 for index in even)


def test_classes_of_few_rows_are_taken_together() -> None:
    assert len(held_out(0.2, {index: (0, index) for index in range(40)}, seed=0)) == 8
    chosen = held_out(0.2, {index: (0, index // 2) for index in range(40)}, seed=0)
    assert len({index // 2 for index in chosen}) == len(chosen) == 8, "a row of each is kept"
    assert max(chosen) > 20, "not those of the first classes"
    chosen = held_out(0.2, {index: (index % 2, index) for index in range(20)}, seed=0)
    assert Counter(index % 2 for index in chosen) == {0: 2, 1: 2}
