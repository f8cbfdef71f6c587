"""Files, globs, lists and mappings: which files are read, in which order, and errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.paths import data_files, find_files, no_split, split_files
from lorakit.errors import DataError
from lorakit.recipe.data_path import DataSource


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Relative paths, as in recipes."""


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text('{"text": "x"}\n')


def names(path: Any, split: str = "train") -> list[str]:
    return [str(file) for file in split_files(path, split)]


def notes(path: Any, split: str = "train") -> str:
    return "\n".join(find_files(path, split).notes)


def refusal(path: Any, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        find_files(path, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Globs


def test_a_glob_is_sorted_by_number() -> None:
    shards = [f"train-{n}.jsonl" for n in (0, 1, 2, 9, 10, 11, 100)]
    touch(*reversed(shards))
    assert names("train-*.jsonl") == names(["train-*.jsonl"]) == shards
    assert names({"train": "train-*.jsonl"}) == names({"train": ["train-*.jsonl"]}) == shards
    assert names("train-?.jsonl") == shards[:4]
    assert names("train-[01].jsonl") == shards[:2]
    assert names("train-*.jsonl", "validation") == []
    assert notes("train-1*.jsonl") == (
        "task.path: train-1*.jsonl: 4 files: train-1.jsonl, train-10.jsonl, train-11.jsonl, "
        "train-100.jsonl"
    )


def test_a_glob_across_directories_and_formats() -> None:
    touch("data/en/x.jsonl", "data/de/2/x.jsonl", "data/de/10/x.jsonl", "data/x.jsonl")
    expected = ["data/de/2/x.jsonl", "data/de/10/x.jsonl", "data/en/x.jsonl", "data/x.jsonl"]
    assert names("data/**/x.jsonl") == expected
    touch("data/en/y.csv", "data/en/z.parquet", "data/en/.hidden.jsonl", "data/.git/x.jsonl")
    assert names("data/en/*") == ["data/en/x.jsonl", "data/en/y.csv", "data/en/z.parquet"]
    assert len(names("data/**")) == 6


def test_a_list_keeps_its_order() -> None:
    touch("b.jsonl", "a.csv", "s-1.jsonl", "s-0.jsonl")
    path = ["b.jsonl", "s-*.jsonl", "a.csv"]
    assert names(path) == ["b.jsonl", "s-0.jsonl", "s-1.jsonl", "a.csv"]


def test_a_glob_ignores_files_about_the_data() -> None:
    beside = [
        "README.md", "LICENSE", "dataset_infos.json", "dataset_info.json", "state.json",
        "a.jsonl.md5", "SHA256SUMS", "checksums.txt", "dataset.py", "dataset.yaml", "_SUCCESS",
        ".a.jsonl.swp",
    ]  # fmt: skip
    touch("d/a.jsonl", *(f"d/{name}" for name in beside))
    assert names("d/*") == ["d/a.jsonl"]
    assert names("d/*.json*", "test") == []
    Path("d/a.jsonl").unlink()
    assert "d/*.json: the glob matches no data file, only d/dataset_info.json" in refusal(
        "d/*.json"
    )


def test_a_glob_does_not_ignore_data_in_other_formats() -> None:
    touch("d/a.jsonl", "d/b.jsonl.xz")
    assert refusal("d/*").startswith("task.path: d/b.jsonl.xz: unknown format; allowed: .jsonl")
    assert names("d/*.jsonl") == ["d/a.jsonl"]


def test_a_glob_without_a_match_is_named() -> None:
    touch("train.jsonl", "d/x/y.jsonl")
    for path in ("train-*.jsonl", ["train.jsonl", "train-*.jsonl"], {"train": "train-*.jsonl"}):
        assert refusal(path) == "task.path: train-*.jsonl: the glob matches no data file"
    assert refusal("d/*") == "task.path: d/*: the glob matches no data file"


def test_an_existing_file_is_not_a_pattern() -> None:
    touch("a[1].jsonl", "a1.jsonl", "a*.jsonl", "ab.jsonl")
    assert names("a[1].jsonl") == ["a[1].jsonl"]
    assert names("a*.jsonl") == ["a*.jsonl"]
    assert names("a?.jsonl") == ["a1.jsonl", "a*.jsonl", "ab.jsonl"]
    assert refusal("a{1,b}.jsonl") == "task.path: a{1,b}.jsonl: no such file or directory"


def test_the_same_file_twice() -> None:
    touch("a.jsonl", "b.jsonl")
    for path in (
        ["a.jsonl", "a.jsonl"],
        ["a.jsonl", "b.jsonl", "./a.jsonl"],
        ["*.jsonl", "a.jsonl"],
        ["a*.jsonl", "*a.jsonl"],
        ["a.jsonl", str(Path("a.jsonl").resolve())],
    ):
        message = refusal(path)
        assert message.startswith("task.path: duplicate file ")
        assert message.endswith("a.jsonl")
    touch("a.jsonl.gz")
    assert "a.jsonl and a.jsonl.gz differ only in format" in refusal("a.*")
    assert names(["a.jsonl", "a.jsonl.gz"]) == ["a.jsonl", "a.jsonl.gz"]


def test_equal_files_of_a_cache_are_two_files() -> None:
    """The Hub's cache links files with equal contents to one blob."""
    touch("blob")
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).symlink_to("blob")
    assert names("*.jsonl") == ["a.jsonl", "b.jsonl"]


def test_a_dangling_link_is_an_error() -> None:
    touch("d/train-0.jsonl")
    Path("d/train-1.jsonl").symlink_to("nowhere")
    for path in ("d/*.jsonl", "d"):
        assert refusal(path) == "task.path: d/train-1.jsonl: dangling symbolic link"


def test_directories_in_a_list() -> None:
    touch("d/train.jsonl", "d/dev.jsonl", "e/train-0.csv", "f.jsonl")
    for path in (["d", "e", "f.jsonl"], {"train": ["d", "e", "f.jsonl"], "dev": "d"}):
        assert names(path) == ["d/train.jsonl", "e/train-0.csv", "f.jsonl"]
        assert names(path, "validation") == ["d/dev.jsonl"]
    assert names({"validation": DataSource(path="d", split="train")}, "dev") == ["d/train.jsonl"]
    assert names({"train": "f.jsonl"}, "validation") == []
    touch("g/a.jsonl")
    expected = "task.path: g: no split 'train'; the directory contains a.jsonl; hint: "
    for path in (["g"], {"train": "g"}, ["d", DataSource(path="g", weight=2)]):
        assert refusal(path).startswith(expected)
    assert refusal({"dev": "e"}, "validation").startswith("task.path: e: no split 'validation'")


def test_the_files_of_sources() -> None:
    touch("a.jsonl", "d/train.jsonl", "d/dev.csv")
    hub = DataSource(path="org/set", split="train", weight=2)
    found = data_files([DataSource(path=["a.jsonl", "d"], weight=1), hub])
    assert set(map(str, found)) >= {"a.jsonl", "d/train.jsonl", "d/dev.csv"}


def test_what_only_a_data_set_on_the_hub_has() -> None:
    touch("a.jsonl", "d/train.jsonl")
    source = DataSource(path="a.jsonl", split="train")
    assert refusal(source) == (
        'task.path: a.jsonl: split = "train", but a file has no splits; allowed: no split, or a '
        "directory or a dataset on the Hub"
    )
    assert 'd: name = "c", but only datasets on the Hub' in refusal(
        [DataSource(path="d", name="c")]
    )
    assert refusal("org/set").endswith(
        "hint: set the path (--set task.path=PATH), or name a split of a dataset on the Hub: "
        "{path: org/set, split: train}"
    )


def test_a_pipe_is_not_opened() -> None:
    os.mkfifo("pipe.jsonl")
    for path in ("pipe.jsonl", "/dev/zero"):
        assert refusal(path) == (f"task.path: {path}: is a device or a pipe; allowed: a data file")


def test_an_impossible_file_name() -> None:
    assert refusal("x" * 5000).startswith("task.path: ")


# Sets of shards


@pytest.mark.parametrize("start", [0, 1])
def test_a_complete_set_of_shards(start: int) -> None:
    shards = [f"train-{n:05}-of-00012.jsonl" for n in range(start, start + 12)]
    touch(*shards)
    assert names("train-*.jsonl") == names(".") == shards


@pytest.mark.parametrize("path", ["d/train-*.jsonl", "d/*", "./d/train-*", "**/*.jsonl", "d"])
def test_a_missing_shard_is_named(path: str) -> None:
    touch("d/train-00000-of-00004.jsonl", "d/train-00003-of-00004.jsonl")
    assert refusal(path) == (
        "task.path: missing shard: d/train-00001-of-00004.jsonl, d/train-00002-of-00004.jsonl"
    )


def test_a_glob_for_some_shards() -> None:
    touch(*(f"train-{n:05}-of-00100.jsonl" for n in range(100) if n != 57))
    assert len(names("train-0001?-of-*.jsonl")) == 10
    assert refusal("train-0005?-*").endswith("missing shard: train-00057-of-00100.jsonl")


def test_a_partial_list_of_shards_is_reported() -> None:
    shards = [f"train-{n:05}-of-00003.jsonl" for n in range(3)]
    touch(*shards)
    assert names(shards[1]) == shards[1:2]
    expected = f"task.path: shards not listed: {shards[0]}, {shards[2]}"
    assert notes(shards[1]) == expected
    assert notes(shards) == ""
    assert names(shards[::-1]) == shards[::-1]


def test_inconsistent_sets_of_shards() -> None:
    touch("a-00000-of-00001.jsonl", "a-00000-of-00002.jsonl", "a-00001-of-00002.jsonl")
    assert "a-00000-of-00002.jsonl are shards of different sets" in refusal("*.jsonl")
    assert len(names("a-*-of-00002.jsonl")) == 2
    touch("b-0-of-2.jsonl", "b-1-of-2.csv", "b-1-of-2.jsonl")
    assert "b-1-of-2.csv and b-1-of-2.jsonl are the same shard" in refusal("b-*")
    assert names("b-*.jsonl") == ["b-0-of-2.jsonl", "b-1-of-2.jsonl"]
    touch("c-0-of-2.jsonl", "c-7-of-2.jsonl")
    assert "c-7-of-2.jsonl: shard number out of range: there are 2 shards" in refusal("c-*")


def test_several_sets_and_formats() -> None:
    shards = ["x-0-of-2.jsonl", "x-1-of-2.csv", "y-0-of-1.parquet"]
    touch(*shards)
    assert names("*-of-*") == shards


# Mappings


def test_several_files_of_a_split() -> None:
    touch("a.jsonl", "b.csv", "dev.jsonl")
    path = {"train": ["a.jsonl", "b.csv"], "dev": "dev.jsonl"}
    assert names(path) == ["a.jsonl", "b.csv"]
    assert names(path, "validation") == names(path, "dev") == ["dev.jsonl"]
    assert names(path, "test") == []
    assert notes(path) == notes(path, "validation") == ""


def test_a_file_in_two_splits_is_reported() -> None:
    touch("a.jsonl", "b.jsonl")
    path = {"train": "*.jsonl", "validation": ["b.jsonl"]}
    assert notes(path).endswith("task.path: in both train and validation: b.jsonl")
    # What is wrong with another split is told when that one is read.
    assert names({"train": "a.jsonl", "validation": "none.jsonl"}) == ["a.jsonl"]


# What is said where there is no such split


def test_no_split() -> None:
    touch("d/b.jsonl", "d/a.csv", "d/sub/x.jsonl", "d/.hidden", "e/test.jsonl", "f/g/h.jsonl")
    message = str(no_split("d", "train"))
    assert message.startswith(
        "task.path: d: no split 'train'; the directory contains a.csv, b.jsonl, sub/; hint: "
    )
    assert "give a file, a glob or a mapping: task.path: {train: FILE}" in message
    assert "e: no split 'train'; allowed: test; the directory contains test.jsonl" in str(
        no_split("e", "train")
    )
    Path("empty").mkdir()
    assert "empty: no split 'train'; the directory is empty" in str(no_split("empty", "train"))
    message = str(no_split({"validation": "x", "test": "y"}, "train"))
    assert message == "task.path: no split 'train'; allowed: validation, test"
    message = str(no_split(["a.jsonl"], "test"))
    assert message.startswith("task.path: a.jsonl: no split 'test'; allowed: train, or a mapping")


def test_all_data_files() -> None:
    touch("d/train.jsonl", "d/dev-0.jsonl", "d/other.jsonl", "d/train.db", "d/data/test.jsonl")
    inside = {"d/train.jsonl", "d/dev-0.jsonl", "d/train.db", "d/data/test.jsonl"}
    assert set(map(str, data_files("d"))) == inside
    path = {"train": ["d/train*.jsonl", "gone.jsonl"], "test": "d/data/test.jsonl"}
    assert {"gone.jsonl", "d/data/test.jsonl"} < set(map(str, data_files(path)))
    assert data_files(None) == []
