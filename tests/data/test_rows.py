"""Rows on disk equal rows in memory."""

from __future__ import annotations

import gzip
import json
import os
import resource
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from lorakit.data.rows import (
    FileStore,
    JsonRows,
    MemoryBudget,
    allow_open_files,
    cache_dir,
    row_range,
)
from lorakit.data.sources import Split, load_split
from lorakit.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"id": "007", "text": "one\ntwo", "value": 1},
    {"id": 8, "text": "é \u2028 \U0001f600", "value": None, "list": [1, {"a": "2020-01-01"}]},
    {"text": ""},
]
FULL = [{name: row.get(name) for name in ("id", "text", "value", "list")} for row in ROWS]
TEXTS = [{"id": f"{n:03}", "text": f'"{n}", é\n{"x" * n}'} for n in range(50)]
NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.tsv", "a.parquet", "a.arrow"]


@pytest.fixture(params=[True, False], ids=["in memory", "on disk"])
def in_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr("lorakit.data.rows.IN_MEMORY_BYTES", 64)
    return bool(request.param)


def loaded(path: Any, limit: int | None = None) -> Split:
    found = load_split(path, "train", limit=limit)
    assert found is not None
    return found


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif file.suffix == ".zst":
        frames = [lines[:100], lines[100:]]  # a file may have several
        file.write_bytes(b"".join(map(zstandard, frames)))
    elif file.suffix == ".jsonl":
        file.write_text(lines)
    elif file.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(file, batch_size=7)
    elif file.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    else:
        import csv

        with file.open("w", newline="", encoding="utf-8") as out:
            tab = file.suffix == ".tsv"
            writer = csv.writer(out, delimiter="\t" if tab else ",")
            writer.writerows([["id", "text"], *([r["id"], r["text"]] for r in rows)])
    return file


def zstandard(text: str) -> bytes:
    return bytes(pyarrow.compress(text.encode(), codec="zstd", asbytes=True))


def texts(name: str) -> list[dict[str, Any]]:
    """tsv cells have neither quotes nor line breaks."""
    return [{**r, "text": r["id"]} for r in TEXTS] if name.endswith(".tsv") else TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_rows_are_exact(tmp_path: Path, name: str, in_memory: bool) -> None:
    content = "\ufeff" + "\n \f\n".join(json.dumps(row) for row in ROWS)
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    split = loaded(str(tmp_path / name))
    assert list(split.rows) == FULL
    assert (len(split), split.columns) == (3, ("id", "text", "value", "list"))
    assert split.rows[-1] == FULL[2]
    assert list(split.rows[1:]) == FULL[1:]
    assert split.column("id") == ["007", 8, None]
    with pytest.raises(IndexError):
        split.rows[3]


@pytest.mark.parametrize("name", NAMES)
def test_formats_are_exact(tmp_path: Path, name: str, in_memory: bool) -> None:
    rows = texts(name)
    split = loaded(str(write(tmp_path / name, rows)))
    assert [dict(row) for row in split.rows] == rows
    assert list(row_range(split.rows, 10, 30)) == rows[10:30]
    assert split.column("id") == [row["id"] for row in rows]


def test_large_parquet_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.data.rows.IN_MEMORY_BYTES", 64)
    import datasets

    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["no", "yes"]), "text": datasets.Value("string")}
    )
    rows = [{"label": n % 2, "text": str(n)} for n in range(2500)]
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "a.parquet")
    found: Any = loaded(str(tmp_path / "a.parquet")).rows
    assert isinstance(found.data, datasets.table.MemoryMappedTable)
    assert found.features["label"].names == ["no", "yes"]
    assert list(found) == rows


@pytest.mark.parametrize("name", NAMES)
def test_no_files_are_left_on_disk(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.data.rows.IN_MEMORY_BYTES", 64)
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    split = loaded(str(write(tmp_path / name, texts(name))))
    assert not list((tmp_path / "cache").glob("*"))
    assert len(list(split.rows)) == 50


def test_files_of_all_formats_together(tmp_path: Path, in_memory: bool) -> None:
    files = [str(write(tmp_path / name, texts(name)[:5])) for name in NAMES]
    split = loaded(files)
    assert [row["id"] for row in split.rows] == [row["id"] for row in TEXTS[:5]] * len(NAMES)
    assert list(row_range(split.rows, 3, 8)) == [split.rows[i] for i in range(3, 8)]
    assert split.locate(23) == f"{files[4]}, row 4"


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_reads_no_further(tmp_path: Path, name: str) -> None:
    rows = texts(name)
    limited = loaded(str(write(tmp_path / name, rows)), limit=3)
    assert [dict(row) for row in limited.rows] == rows[:3]
    fingerprints = {loaded(str(tmp_path / name), limit=n).fingerprint for n in (1, 2, 3, None)}
    assert limited.fingerprint in fingerprints
    assert len(fingerprints) == 4


def test_a_limit_ignores_errors_after_it(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", ROWS)
    with first.open("a") as out:
        out.write("not JSON\n")
    second = tmp_path / "b.jsonl"
    second.write_text("nor this\n")
    assert len(loaded([str(first), str(second)], limit=3)) == 3
    with pytest.raises(DataError, match=r"a\.jsonl, row 4: not JSON"):
        loaded([str(first), str(second)], limit=4)


def test_a_file_that_changes_while_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.data.rows.IN_MEMORY_BYTES", 64)
    file = write(tmp_path / "a.jsonl", TEXTS)
    split = loaded(str(file))
    assert isinstance(split.rows, JsonRows)
    replaced = tmp_path / "new.jsonl"
    write(replaced, TEXTS[::-1]).rename(file)
    assert split.rows[0] == TEXTS[0], "what was opened is still there"
    split = loaded(str(file))
    with file.open("r+") as out:
        out.truncate(100)
    with pytest.raises(DataError, match=r"a\.jsonl: the file has changed since it was first read"):
        split.rows[49]


def test_a_file_read_by_several_processes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", TEXTS)
    source = FileStore(file.open("rb"), str(file))
    before = source.read(0, 10)
    if (child := os.fork()) == 0:
        source.read(20, 60)
        os._exit(0)
    os.waitpid(child, 0)
    assert source.read(0, 10) == before == file.read_bytes()[:10]


def test_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LORAKIT_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "lorakit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / "home" / ".cache" / "lorakit"


def test_a_full_disk_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Any:
        return Path("/dev/full").open("wb", buffering=0)

    monkeypatch.setattr("lorakit.data.rows.IN_MEMORY_BYTES", 64)
    monkeypatch.setattr("lorakit.data.rows.scratch_file", full)
    file = write(tmp_path / "a.csv", TEXTS)
    expected = r"a\.csv: cannot write to the disk of .*No space left.*LORAKIT_CACHE"
    with pytest.raises(DataError, match=expected):
        loaded(str(file))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz", "a.parquet"])
def test_files_share_the_memory_budget(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is small enough, but there may be thousands."""
    monkeypatch.setattr("lorakit.data.rows.IN_MEMORY_BYTES", 10_000)
    budgets = [MemoryBudget()]
    monkeypatch.setattr("lorakit.data.sources.MemoryBudget", lambda: budgets[0])
    paths = [str(write(tmp_path / f"{n}{name}", TEXTS)) for n in range(8)]
    split = loaded(paths)
    assert [row["text"] for row in split.rows] == [row["text"] for row in TEXTS] * 8
    assert 0 <= budgets[0].left < 5_000, "some are in memory, and not all"


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
        allow_open_files(10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600, hard)
        allow_open_files(700)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(700, hard)
        allow_open_files(10**9)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
