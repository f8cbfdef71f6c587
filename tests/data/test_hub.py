"""Datasets on the Hub, served from the cache of ``datasets``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.sources import load_split
from lorakit.data.stream import open_stream
from lorakit.errors import DataError
from lorakit.recipe.data_path import DataSource

TRAIN = [{"text": f"hub {n}"} for n in range(6)]
TEST = [{"text": "held out"}]


@pytest.fixture(autouse=True)
def _cached(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``org/set``, with the configuration ``default``."""
    import datasets

    files = {}
    for split, rows in (("train", TRAIN), ("test", TEST)):
        files[split] = str(in_tmp / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = in_tmp / "cache"
    datasets.load_dataset("json", data_files=files, cache_dir=str(cache))
    (built,) = (cache / "json").glob("*/*/*/dataset_info.json")
    as_of_the_hub = cache / "org___set" / "default" / "0.0.0"
    as_of_the_hub.mkdir(parents=True)
    found = built.parent.rename(as_of_the_hub / built.parent.name)
    for file in found.glob("json-*.arrow"):
        file.rename(found / file.name.replace("json-", "set-"))
    info = json.loads((found / "dataset_info.json").read_text())
    info["dataset_name"], info["config_name"] = "set", "default"
    (found / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def rows(path: Any, split: str = "train", limit: int | None = None) -> list[dict[str, Any]] | None:
    found = load_split(path, split, limit=limit)
    return found and [dict(row) for row in found.rows]


def refusal(path: Any, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        load_split(path, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_split_and_a_configuration() -> None:
    for name in (None, "default"):
        source = DataSource(path="org/set", name=name, split="train")
        for path in (source, [source], {"train": source}):
            assert rows(path) == TRAIN
    assert rows(DataSource(path="org/set", name="default")) == TRAIN
    assert rows(source, limit=2) == TRAIN[:2]
    found = load_split(source, "train")
    assert found is not None
    assert found.locate(2) == "org/set/default (train), row 3"


def test_other_splits() -> None:
    train, test = (DataSource(path="org/set", split=split) for split in ("train", "test"))
    assert rows({"train": train, "validation": test}, "validation") == TEST
    assert rows(train, "validation") is rows(train, "test") is None
    assert rows(DataSource(path="org/set", name="default"), "test") == TEST
    assert rows(DataSource(path="org/set", name="default"), "validation") is None


def test_what_the_data_set_lacks() -> None:
    expected = "task.path: org/set: no split 'tests'; allowed: train, test"
    assert refusal(DataSource(path="org/set", split="tests")) == expected
    held_out = {"dev": DataSource(path="org/set", name="default")}
    assert refusal(held_out, "validation").startswith("task.path: org/set/default: no split 'valid")
    assert refusal(DataSource(path="org/set", name="other")).startswith(
        "task.path: cannot load the Hub dataset 'org/set/other': "
    )
    message = refusal(DataSource(path="no/where", split="train"))
    assert message.startswith("task.path: cannot load the Hub dataset 'no/where': ")
    assert "HF_HUB_OFFLINE" in message


def test_together_with_files() -> None:
    source = DataSource(path="org/set", split="train", weight=3)
    Path("own.jsonl").write_text('{"text": "own", "more": 1}\n{"text": "own"}\n')
    filled = [{"text": row["text"], "more": None} for row in TRAIN]
    own = [{"text": "own", "more": 1}, {"text": "own", "more": None}]
    plain = source.model_copy(update={"weight": None})
    assert rows([plain, "own.jsonl"]) == [*filled, *own]
    found = load_split([source, "own.jsonl"], "train")
    assert found is not None
    assert list(found.rows) == [*filled, *own]
    assert [(s.label, s.rows, s.weight) for s in found.sources] == [
        ("org/set (train)", 6, 3.0),
        ("own.jsonl", 2, 1.0),
    ]
    stream = open_stream([plain, "own.jsonl"], "train")
    assert stream is not None
    assert [row.row for row in stream.read()] == [*filled, *own]
    assert str(list(stream.read())[5]) == "org/set (train), row 6"
