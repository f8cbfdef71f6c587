"""Directories whose files are named by split: shards, subdirectories, ignored files."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.data.file_names import in_order
from lorakit.data.paths import in_directory
from lorakit.errors import DataError


def found(folder: Path, split: str = "train") -> list[str]:
    return [str(file.relative_to(folder)) for file in in_directory(folder, split).files]


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def notes(folder: Path, split: str = "train") -> str:
    return "\n".join(in_directory(folder, split).notes)


def refusal(folder: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        in_directory(folder, split)
    return str(caught.value)


@pytest.mark.parametrize(
    "shards",
    [
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
        ["train-00000-of-00001-a09b74b3ef9c3b56.parquet"],
        ["train_0.jsonl", "train_2.jsonl", "train_10.jsonl"],
        ["train.0.csv", "train.1.csv"],
        ["train 1.jsonl", "train 2.jsonl"],
        ["train0.json", "train1.json.gz"],
        ["train-part-1.jsonl.gz", "train-part-2.jsonl"],
        ["train_code.jsonl", "train_math.jsonl"],
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["train/0000.parquet", "train/0001.parquet"],
        ["train/a/2.jsonl", "train/a/10.jsonl", "train/b.csv"],
        ["data/train/x.jsonl"],
    ],
    ids=lambda shards: shards[0],
)
def test_names_of_shards(tmp_path: Path, shards: list[str]) -> None:
    others = ["test-0.jsonl", "trainer.jsonl", "training.csv", "README.md", "dataset_infos.json"]
    put(tmp_path, *reversed(shards), *others, "train.md5", "train-notes.md", ".train.jsonl")
    assert found(tmp_path) == shards
    assert found(tmp_path, "test") == ["test-0.jsonl"]
    assert found(tmp_path, "validation") == []
    (note,) = in_directory(tmp_path, "train").notes
    assert f"{len(shards)} file{'s' * (len(shards) > 1)}: " in note
    assert all(Path(shard).name in note for shard in shards)


@pytest.mark.parametrize("name", ["validation", "valid", "dev", "val"])
@pytest.mark.parametrize("form", ["{}-00000-of-00001.jsonl", "{}_1.csv", "{}/x.jsonl"])
def test_aliases_of_the_validation_split(tmp_path: Path, name: str, form: str) -> None:
    put(tmp_path, form.format(name), "train.jsonl")
    assert found(tmp_path, "validation") == found(tmp_path, "dev") == [form.format(name)]
    assert found(tmp_path) == ["train.jsonl"]
    assert notes(tmp_path) == ""


def test_longer_names_are_other_splits(tmp_path: Path) -> None:
    matched = "validation_matched-00000-of-00001.parquet"
    put(tmp_path, matched, "validation_mismatched.jsonl", "test_matched.jsonl")
    assert found(tmp_path, "validation") == found(tmp_path, "test") == []
    assert found(tmp_path, "validation_matched") == [matched]
    assert found(tmp_path, "validation_mismatched") == ["validation_mismatched.jsonl"]
    put(tmp_path, "validation-0.jsonl")
    assert found(tmp_path, "validation") == ["validation-0.jsonl"]


def test_ignored_files_are_reported(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", "train_old.jsonl", "train-clean.csv", "trainer_state.json")
    assert found(tmp_path) == ["train.jsonl"]
    assert notes(tmp_path).endswith(
        "ignored in favor of train.jsonl: train-clean.csv, train_old.jsonl"
    )
    (tmp_path / "train.jsonl").rename(tmp_path / "train-0-of-1.jsonl")
    assert found(tmp_path) == ["train-0-of-1.jsonl"]
    assert "ignored in favor of train-0-of-1.jsonl: train-clean.csv, train_old" in notes(tmp_path)


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        (["train.jsonl", "train.json"], "train.json", "train.jsonl"),
        (["train.jsonl", "train-00000-of-00001.jsonl"], "train.jsonl", "train-00000-of-00001"),
        (["train.jsonl", "train_1.csv"], "train.jsonl", "train_1.csv"),
        (["train.jsonl", "data/train.jsonl"], "train.jsonl", "data/train.jsonl"),
        (["train.jsonl", "train/0.jsonl"], "train.jsonl", "train/0.jsonl"),
        (["train-0.jsonl", "data/train-0.jsonl"], "train-0.jsonl", "data/train-0.jsonl"),
    ],
)
def test_a_split_in_two_places(tmp_path: Path, names: list[str], first: str, second: str) -> None:
    put(tmp_path, *names)
    assert refusal(tmp_path).startswith(f"task.path: {tmp_path}: {first} and {second}")
    assert "both name split 'train'; hint: keep one of them, or map" in refusal(tmp_path)


def test_two_names_of_a_split(tmp_path: Path) -> None:
    put(tmp_path, "dev-0.jsonl", "val-0.jsonl")
    assert "dev-0.jsonl and val-0.jsonl both name split 'valid" in refusal(tmp_path, "val")
    put(tmp_path / "b", "valid/0.jsonl", "dev/0.jsonl")
    assert "valid/0.jsonl and dev/0.jsonl both name" in refusal(tmp_path / "b", "validation")


def test_shards_that_differ_only_in_format(tmp_path: Path) -> None:
    put(tmp_path, "train_0.jsonl", "train_0.jsonl.gz", "train_1.jsonl")
    assert "train_0.jsonl and train_0.jsonl.gz differ only in format" in refusal(tmp_path)


def test_a_folder_with_files_that_are_not_read(tmp_path: Path) -> None:
    put(tmp_path, "train/data-00000-of-00001.npz", "train/state.json", "train/dataset_info.json")
    assert "train/data-00000-of-00001.npz: unknown format" in refusal(tmp_path)
    put(tmp_path, "dev/README.md", "dev/.ipynb_checkpoints/a.jsonl")
    assert found(tmp_path, "validation") == []


def test_links_are_followed(tmp_path: Path) -> None:
    put(tmp_path, "elsewhere/a.jsonl")
    (tmp_path / "d" / "train").mkdir(parents=True)
    (tmp_path / "d" / "train" / "part").symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "d") == ["train/part/a.jsonl"]


def test_order() -> None:
    names = ["b1", "a10/x", "a2/y", "a2/x10", "a2/x9", "a02/x", "B1", "a"]
    expected = ["B1", "a", "a02/x", "a2/x9", "a2/x10", "a2/y", "a10/x", "b1"]
    for order in (names, names[::-1]):
        assert [str(file) for file in in_order(map(Path, order))] == expected
