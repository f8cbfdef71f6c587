"""Files with different columns: rows have all of them, None where one is missing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lorakit.data.rows import row_range
from lorakit.data.sources import Split, load_split
from lorakit.data.stream import open_stream
from lorakit.errors import DataError

FORMS = ["jsonl", "json", "csv", "tsv", "parquet"]
FIRST = {"instruction": "Translate", "input": "good morning", "output": "bonjour"}
SECOND = {"instruction": "Name a colour", "output": "blue"}


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    form = file.suffix
    if form == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif form in (".csv", ".tsv"):
        tab = "," if form == ".csv" else "\t"
        cells = [list(rows[0]), *(row.values() for row in rows)]
        file.write_text("".join(f"{tab.join(map(str, row))}\n" for row in cells))
    elif form == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


def loaded(path: Any) -> Split:
    found = load_split(path, "train")
    assert found is not None
    return found


def streamed(path: Any) -> list[dict[str, Any]]:
    stream = open_stream(path, "train")
    assert stream is not None
    return [dict(located.row) for located in stream.read()]


@pytest.mark.parametrize(("one", "other"), list(itertools.product(FORMS, FORMS)))
def test_a_column_missing_from_one_file(tmp_path: Path, one: str, other: str) -> None:
    files = [write(tmp_path / f"a.{one}", [FIRST]), write(tmp_path / f"b.{other}", [SECOND] * 2)]
    blank = {**SECOND, "input": None}
    for order, expected in ((files, [FIRST, blank, blank]), (files[::-1], [blank, blank, FIRST])):
        split = loaded(order)
        assert list(map(dict, split.rows)) == streamed(order) == expected
        assert split.column("input") == [row["input"] for row in expected]
        assert set(split.columns) == {"instruction", "input", "output"}
        assert row_range(split.rows, 0, 3) == expected
        assert row_range(split.rows, 1, 2) == expected[1:2]
        assert [dict(split.rows[index]) for index in (0, 1, 2, -1)] == [*expected, expected[-1]]
        assert split.notes == (
            f"columns missing from some files, empty in their rows: 'input' ({files[1]})",
        )


def test_files_with_equal_columns_need_no_note(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", [FIRST]), write(tmp_path / "b.parquet", [FIRST])]
    assert loaded(files).notes == ()
    assert loaded(files[0]).notes == ()


def test_a_file_without_rows_among_others(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", [FIRST]), write(tmp_path / "b.json", [])]
    for order in (files, files[::-1]):
        split = loaded(order)
        assert list(map(dict, split.rows)) == streamed(order) == [FIRST]
        assert split.notes == (f"files without rows: {files[1]}",)
        assert split.locate(0) == f"{files[0]}, row 1"


def test_many_parts(tmp_path: Path) -> None:
    rows = [{"n": n, f"c{n // 6 % 3}": str(n)} for n in range(60)]
    files = [
        write(tmp_path / f"{part:02}.{FORMS[part % 2 * 4]}", rows[part * 6 : part * 6 + 6])
        for part in range(10)
    ]
    split = loaded(files)
    expected = [{"n": None, "c0": None, "c1": None, "c2": None, **row} for row in rows]
    assert list(split.rows) == expected
    assert row_range(split.rows, 4, 40) == expected[4:40]
    assert split.rows[50:3:-7] == expected[50:3:-7]  # type: ignore[comparison-overlap]


# Parquet and its types


def table(file: Path, **columns: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return str(file)


def test_compatible_tables_are_concatenated(tmp_path: Path) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    for name, label in (("a", 1), ("b", 0)):
        datasets.Dataset.from_dict({"label": [label]}, features).to_parquet(
            tmp_path / f"{name}.parquet"
        )
    files = [str(tmp_path / "a.parquet"), table(tmp_path / "c.parquet", text=["x"])]
    split = loaded([*files, str(tmp_path / "b.parquet")])
    assert isinstance(split.rows, datasets.Dataset)
    assert split.rows.features["label"].names == ["no", "yes"]
    assert split.column("label") == [1, None, 0]


@pytest.mark.parametrize(
    ("first", "second", "values"),
    [
        (pyarrow.array([1], pyarrow.int32()), pyarrow.array([2], pyarrow.int64()), [1, 2]),
        (pyarrow.array(["a"]), pyarrow.array(["b"], pyarrow.large_string()), ["a", "b"]),
        (pyarrow.array([None], pyarrow.null()), pyarrow.array(["b"]), [None, "b"]),
        (pyarrow.array([{"r": 1, "c": "x"}]), pyarrow.array([{"c": "y", "r": 2, "n": 3}]),
         [{"r": 1, "c": "x", "n": None}, {"c": "y", "r": 2, "n": 3}]),
    ],
)  # fmt: skip
def test_types_that_are_equal_in_rows(
    tmp_path: Path, first: Any, second: Any, values: list[Any]
) -> None:
    files = [table(tmp_path / "a.parquet", x=first), table(tmp_path / "b.parquet", x=second)]
    assert loaded(files).column("x") == values


def test_incompatible_types_are_an_error(tmp_path: Path) -> None:
    files = [
        table(tmp_path / "a.parquet", other=["z"]),
        table(tmp_path / "b.parquet", x=[1]),
        table(tmp_path / "c.parquet", x=["one"]),
    ]
    with pytest.raises(DataError, match=r"a column's type differs between files: .*c\.parquet: "):
        loaded(files)


def test_different_class_names_are_an_error(tmp_path: Path) -> None:
    """An id would mean a different class in each file."""
    for name, names in (("a", ["no", "yes"]), ("b", ["yes", "no"])):
        features = datasets.Features({"label": datasets.ClassLabel(names=names)})
        datasets.Dataset.from_dict({"label": [1]}, features).to_parquet(
            tmp_path / f"{name}.parquet"
        )
    files = [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    with pytest.raises(
        DataError, match=r"column 'label' has the class names .*; allowed: the same"
    ):
        loaded(files)
