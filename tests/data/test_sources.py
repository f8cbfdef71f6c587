"""Loading splits: files by name, formats, and one-line errors."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from lorakit.data.paths import split_files
from lorakit.data.sources import Split, load_split
from lorakit.errors import DataError

ROWS = [{"text": "one", "label": 0}, {"text": "two", "label": 1}]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(file: Path, content: str | bytes | None = None) -> str:
    content = lines(ROWS) if content is None else content
    data = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return str(file)


def write_parquet(file: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    import datasets

    with file.open("wb") as handle:
        datasets.Dataset.from_list(rows).to_parquet(handle)
    return str(file)


def rows_of(path: Any, split: str = "train") -> list[dict[str, Any]]:
    found = load_split(path, split)
    assert found is not None
    return [dict(row) for row in found.rows]


def refusal(path: Any, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        load_split(path, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Which files


@pytest.mark.parametrize("name", ["validation", "valid", "dev", "val"])
@pytest.mark.parametrize("asked", ["validation", "dev"])
def test_aliases_in_a_directory_and_a_mapping(tmp_path: Path, name: str, asked: str) -> None:
    file = write(tmp_path / f"{name}.jsonl")
    assert split_files(str(tmp_path), asked) == [Path(file)]
    assert split_files({name: file}, asked) == [Path(file)]


@pytest.mark.parametrize("name", ["train", "test", "validation_matched", "validation_mismatched"])
def test_other_splits_have_no_aliases(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / f"{name}.jsonl")
    assert split_files(str(tmp_path), name) == [Path(file)]
    assert split_files(str(tmp_path), "validation") == []
    assert split_files({name: file}, name) == [Path(file)]
    assert load_split(str(tmp_path), "validation") is None


def test_other_files_of_a_directory_are_not_read(tmp_path: Path) -> None:
    for name in (
        "train.tables.jsonl",
        "train.txt",
        "train.db",
        "README.md",
        "trainx.csv",
    ):
        write(tmp_path / name, "not to be read")
    (tmp_path / "train.csv").mkdir()
    assert load_split(str(tmp_path), "train") is None


@pytest.mark.parametrize("names", [("train.jsonl", "train.jsonl.gz"), ("train.csv", "train.tsv")])
def test_two_files_of_one_split(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        write(tmp_path / name)
    assert f"{names[0]} and {names[1]} both name split 'train'" in refusal(str(tmp_path))


def test_two_aliases_of_one_split(tmp_path: Path) -> None:
    files = {name: write(tmp_path / f"{name}.jsonl") for name in ("dev", "val")}
    expected = "both name split 'validation'"
    assert f"dev.jsonl and val.jsonl {expected}" in refusal(str(tmp_path), "validation")
    assert f"dev and val {expected}" in refusal(files, "validation")


def test_a_file_or_a_list_is_train_only(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl")
    for path in (file, [file]):
        assert split_files(path, "train") == [Path(file)]
        assert split_files(path, "validation") == []


def test_an_unknown_split_in_a_mapping(tmp_path: Path) -> None:
    message = refusal({"train": write(tmp_path / "a.jsonl"), "validaton": "b.jsonl"})
    assert (
        "unknown split 'validaton' (did you mean 'validation'?); allowed: train, valid" in message
    )


def test_missing_files(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.jsonl")
    for path in (missing, [missing], {"train": missing}):
        assert refusal(path) == f"task.path: {missing}: no such file or directory"
    assert "no such file" in refusal(missing, "validation")
    assert "the directory is empty" in refusal([str(tmp_path)])


def test_unknown_format(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.txt"))
    allowed = (
        ".jsonl, .jsonl.gz, .jsonl.zst, .json, .json.gz, .json.zst, "
        ".csv, .csv.gz, .csv.zst, .tsv, .tsv.gz, .tsv.zst, .parquet, .arrow"
    )
    assert message.endswith(f"unknown format; allowed: {allowed}")


# Formats


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"a{suffix}", lines(ROWS[:1]) + "\n" + lines(ROWS[1:]) + "\n")
    assert rows_of(file) == ROWS


def test_parquet(tmp_path: Path) -> None:
    assert rows_of(write_parquet(tmp_path / "a.parquet")) == ROWS


@pytest.mark.parametrize("dictionary", [True, False])
def test_parquet_from_other_writers(tmp_path: Path, dictionary: bool) -> None:
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.array(["one", "two"], pyarrow.large_string())
    table = pyarrow.table(
        {"text": text.dictionary_encode() if dictionary else text, "label": [0, 1]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert rows_of(str(tmp_path / "a.parquet")) == ROWS


def test_class_names_of_a_parquet_file(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"label": [1, 0]}, features).to_parquet(tmp_path / "a.parquet")
    found = load_split(str(tmp_path / "a.parquet"), "train")
    assert found is not None
    assert found.rows.features["label"].names == ["no", "yes"]  # type: ignore[attr-defined]


def saved(folder: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder, **options)
    return str(folder)


def test_a_saved_data_set(tmp_path: Path) -> None:
    path = saved(tmp_path / "set", ROWS * 3, num_shards=2)
    (tmp_path / "set" / "cache-0123.arrow").write_bytes(b"left by Dataset.map")
    found = load_split(path, "train")
    assert found is not None
    assert [dict(row) for row in found.rows] == ROWS * 3
    assert found.rows.features["label"].names == ["no", "yes"]  # type: ignore[attr-defined]
    assert found.locate(3) == f"{path}/data-00001-of-00002.arrow, row 1"
    assert load_split(path, "validation") is None
    assert rows_of({"train": "none.jsonl", "validation": path}, "validation") == ROWS * 3
    (tmp_path / "set" / "data-00001-of-00002.arrow").unlink()
    assert refusal(path) == f"task.path: missing shard: {path}/data-00001-of-00002.arrow"


def test_a_saved_data_set_without_rows(tmp_path: Path) -> None:
    import datasets

    path = str(tmp_path / "set")
    datasets.Dataset.from_dict({"text": []}).save_to_disk(path)
    assert refusal(path) == f"task.path: {path}: the saved dataset has no rows"
    assert refusal([path]) == refusal(path)
    (tmp_path / "set" / "state.json").write_text("[" * 100_000)
    assert load_split(path, "train") is None


def test_a_saved_dictionary_of_data_sets(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS), ("dev", ROWS[:1])):
        saved(tmp_path / split, rows)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "dev"]}')
    assert rows_of(str(tmp_path)) == ROWS
    assert rows_of(str(tmp_path), "validation") == ROWS[:1]
    assert load_split(str(tmp_path), "test") is None


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("stem", ["a[b]", "a*", "a?", "zip::a", "file:a%20"])
def test_a_path_is_neither_a_pattern_nor_a_url(tmp_path: Path, stem: str, suffix: str) -> None:
    folder = tmp_path / "x[y]*"
    folder.mkdir()
    contents = {".csv": "text,label\n{},1\n", ".tsv": "text\tlabel\n{}\t1\n"}
    for name in ("ab", "ac", stem):
        file = folder / f"{name}{suffix}"
        if suffix == ".parquet":
            write_parquet(file, [{"text": name}])
        elif suffix in contents:
            write(file, contents[suffix].format(name))
        else:
            write(file, lines([{"text": name}]))
    assert [row["text"] for row in rows_of(str(folder / f"{stem}{suffix}"))] == [stem]


def test_a_key_that_first_occurs_late_in_a_large_file(tmp_path: Path) -> None:
    rows = [{"text": "x" * 100_000}] * 120 + [{"text": "y", "label": 1}]
    read = rows_of(write(tmp_path / "a.jsonl", lines(rows)))
    assert (read[0]["label"], read[-1]) == (None, {"text": "y", "label": 1})


def test_a_byte_order_mark_before_json(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "a.jsonl", "\ufeff" + lines(ROWS))) == ROWS


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    content = '\ufefftext,label\nNA,1\nnull,02\n,nan\n"a, ""b""\nc",True\n\n1.0,2020-01-01\n'
    assert rows_of(write(tmp_path / "a.csv", content)) == [
        {"text": "NA", "label": "1"},
        {"text": "null", "label": "02"},
        {"text": "", "label": "nan"},
        {"text": 'a, "b"\nc', "label": "True"},
        {"text": "1.0", "label": "2020-01-01"},
    ]


def test_tsv_quotes_are_characters(tmp_path: Path) -> None:
    content = 'text\tlabel\n"so it goes\t1\nhe said "no"\t0\n'
    assert rows_of(write(tmp_path / "a.tsv", content)) == [
        {"text": '"so it goes', "label": "1"},
        {"text": 'he said "no"', "label": "0"},
    ]


def test_a_long_csv_cell(tmp_path: Path) -> None:
    long = "x" * 300_000
    assert rows_of(write(tmp_path / "a.csv", f"text\n{long}\n")) == [{"text": long}]


def test_json_text_that_looks_like_dates_stays_text(tmp_path: Path) -> None:
    rows = [{"text": "2020-01-01", "label": 1}, {"text": "2021-02-03"}]
    assert rows_of(write(tmp_path / "a.jsonl", lines(rows))) == [
        rows[0],
        {**rows[1], "label": None},
    ]


def test_dates_within_messages_stay_text(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "assistant", "content": "2020-01-01"}]}]
    assert rows_of(write(tmp_path / "a.jsonl", lines(rows))) == rows


def test_any_json_text_stays_text(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("NA", "null", "", "007", "a\u2028b", "\ufeffx", "é")]
    assert rows_of(write(tmp_path / "a.jsonl", lines(rows))) == rows


def test_messages_keep_their_shape(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]},
    ]
    assert rows_of(write(tmp_path / "a.jsonl", lines(rows))) == rows


# What cannot be read


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    assert refusal(write(tmp_path / name, b"")) == f"{tmp_path / name}: the file is empty"


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", "\n\n"), ("a.jsonl.gz", ""), ("a.csv", "text,label\n"), ("a.tsv", "text\n")],
)
def test_a_file_without_rows(tmp_path: Path, name: str, content: str) -> None:
    file = write(tmp_path / name, content)
    assert refusal(file) == f"{file}: the split 'train' is empty"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(
    ("broken", "expected"),
    [('{"text": "a"\n', "not JSON"), ("[1, 2]\n", "not a JSON object"), ("text\n", "not JSON")],
)
def test_a_broken_json_row_is_named(
    tmp_path: Path, suffix: str, broken: str, expected: str
) -> None:
    file = write(tmp_path / f"a{suffix}", lines(ROWS) + broken + lines(ROWS))
    assert refusal(file).startswith(f"{file}, row 3: {expected}")


def test_json_rows_without_a_key(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "{}\n{}\n")
    assert refusal(file) == f"{file}: every row is an empty object, {{}}: there are no columns"


def test_a_lone_surrogate(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}\n{"text": "\\uD83D"}\n')
    assert refusal(file).startswith(f"{file}, row 2: lone surrogate")


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [("a.jsonl", '{"text": "ok"}\n', ", row 2: not UTF-8"), ("a.csv", "text\n", ": not UTF-8")],
)
def test_bytes_that_are_not_text(tmp_path: Path, name: str, head: str, expected: str) -> None:
    file = write(tmp_path / name, head.encode() + b'{"text": "caf\xe9"}\n')
    assert refusal(file).startswith(f"{file}{expected}")


def test_broken_containers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip at all")
    whole = gzip.compress(lines(ROWS * 500).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing behind")
    (tmp_path / "d.jsonl.zst").write_bytes(b"no zstandard at all")
    whole = pyarrow.compress(lines(ROWS * 500).encode(), codec="zstd", asbytes=True)
    (tmp_path / "e.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "f.arrow").write_bytes(b"nothing that Arrow has written")
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.parquet", "d.jsonl.zst", "e.jsonl.zst", "f.arrow"):
        assert refusal(str(tmp_path / name)).startswith(f"{tmp_path / name}: cannot be read: ")


def test_a_corrupt_parquet_file_is_reported_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refusal(write(tmp_path / "a.parquet", b"xx"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text,label\na,1\nb\n", "row 2: 1 cell; the header has 2"),
        ("text,label\na,1,2\n", "row 1: 3 cells; the header has 2"),
        ('text\na\n"unfinished\n', "row 2: "),
        ("text,text\na,b\n", "duplicate column 'text' in the header"),
        ("\ntext\na\n", "the first line is empty"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str, expected: str) -> None:
    assert expected in refusal(write(tmp_path / "a.csv", content))


# Several files, limits, columns


def test_locating_rows_in_several_files(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "a.jsonl"),
        write(tmp_path / "b.jsonl", lines([{"label": 2, "text": "three", "more": 1}])),
        write(tmp_path / "c.jsonl.gz"),
    ]
    found = load_split(files, "train")
    assert found is not None
    assert [row["text"] for row in found.rows] == ["one", "two", "three", "one", "two"]
    places = [
        f"{files[0]}, row 1",
        f"{files[0]}, row 2",
        f"{files[1]}, row 1",
        f"{files[2]}, row 1",
    ]
    assert [found.locate(index) for index in range(4)] == places
    assert found.columns == ("text", "label", "more")
    assert found.column("more") == [None, None, 1, None, None]
    assert found.column("label") == [0, 1, 2, 0, 1]


def test_files_of_different_formats(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.csv", "label,text\n1,x\n"), write(tmp_path / "b.jsonl")]
    found = load_split(files, "train")
    assert found is not None
    assert found.column("text") == ["x", "one", "two"]
    assert found.locate(2) == f"{files[1]}, row 2"


def test_required_columns(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "a.jsonl"),
        write(tmp_path / "b.jsonl", '{"body": "x", "label": 1}\n'),
    ]
    found = load_split(files, "train")
    assert found is not None
    found.require(["label"])
    with pytest.raises(DataError) as caught:
        found.require(["text", "label"])
    expected = f"{files[1]}, row 1: no column 'text'; the columns are 'body', 'label'"
    assert str(caught.value) == expected
    with pytest.raises(DataError) as caught:
        found.require(["words", "kind"])
    expected = "no columns 'words', 'kind'; the columns are 'text', 'label', 'body'"
    assert str(caught.value) == f"{', '.join(files)}: {expected}"


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv", "both"])
def test_files_without_common_columns(tmp_path: Path, form: str) -> None:
    def put(name: str, form: str) -> str:
        file = tmp_path / f"{name}.{form}"
        rows = [{name: "x"}, {name: "y"}]
        if form == "parquet":
            return write_parquet(file, rows)
        return write(file, f"{name}\nx\ny\n" if form == "csv" else lines(rows))

    forms = ("parquet", "jsonl") if form == "both" else (form, form)
    files = [put("text", forms[0]), put("body", forms[1])]
    x, y = ({"text": t, "body": None} for t in "xy")
    assert rows_of(files) == [x, y, {"text": None, "body": "x"}, {"text": None, "body": "y"}]


def test_files_whose_types_differ(tmp_path: Path) -> None:
    files = [
        write_parquet(tmp_path / "a.parquet"),
        write_parquet(tmp_path / "b.parquet", [{"text": ["x"], "label": 1}]),
    ]
    assert "a column's type differs between files" in refusal(files)


def test_an_empty_file_among_others_is_an_error(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", b"")]
    assert refusal(files) == f"{files[1]}: the file is empty"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_limit(tmp_path: Path, name: str) -> None:
    content = "text,label\none,0\ntwo,1\n" if name.endswith("csv") else None
    file = write(tmp_path / name, content)
    first, all_rows = load_split(file, "train", limit=1), load_split(file, "train", limit=9)
    assert first is not None
    assert all_rows is not None
    assert (first.column("text"), all_rows.column("text")) == (["one"], ["one", "two"])
    assert first.fingerprint != all_rows.fingerprint


def test_the_fingerprint_depends_on_the_contents(tmp_path: Path) -> None:
    def fingerprint(file: str) -> str:
        found = load_split(file, "train")
        assert found is not None
        return found.fingerprint

    same = fingerprint(write(tmp_path / "a.jsonl"))
    assert fingerprint(write(tmp_path / "b.jsonl")) == same
    assert fingerprint(write(tmp_path / "b.jsonl", lines(ROWS[:1]))) != same


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_file_that_changes_is_read_again(tmp_path: Path, name: str) -> None:
    def write_rows(rows: list[dict[str, Any]]) -> str:
        if name.endswith("parquet"):
            return write_parquet(tmp_path / name, rows)
        csv = "text\n" + "".join(f"{row['text']}\n" for row in rows)
        return write(tmp_path / name, csv if name.endswith("csv") else lines(rows))

    for rows in (ROWS, ROWS[::-1]):
        file = write_rows(rows)
        os.utime(file, (1, 1))
        assert [row["text"] for row in rows_of(file)] == [row["text"] for row in rows]


def test_a_tasks_reader_comes_first(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "anything\n")
    found = load_split(file, "train", read_file=lambda path: [{"name": path.name}])
    assert found == Split(
        "train", [{"name": "a.jsonl"}], file, found.fingerprint, ((Path(file), 1),)
    )  # type: ignore[union-attr]


# The Hub


def test_no_path_and_no_data_set() -> None:
    assert "task.path = null: " in refusal(None)


def test_an_unreachable_hub_is_a_one_line_error() -> None:
    with pytest.raises(DataError) as caught:
        load_split(None, "train", hub=("nyu-mll/glue", "sst2"))
    message = str(caught.value)
    assert message.startswith("task.path = null: cannot load the Hub dataset 'nyu-mll/glue/sst2': ")
    assert "HF_HUB_OFFLINE" in message
    assert "\n" not in message
