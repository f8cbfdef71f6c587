"""Several processes produce the same tokens and errors as one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from lorakit.data import shards
from lorakit.data.encode import EncodedSplit, encode_split
from lorakit.data.examples import ClassificationExample, Segment, TextExample
from lorakit.data.sources import Split
from lorakit.errors import DataError, LorakitError

ROWS = [{"n": n} for n in range(3500)]
SPLIT = Split("train", ROWS, "rows.jsonl", "0")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def processes(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MANY_ROWS", 1000)
    monkeypatch.setattr(shards, "process_count", lambda rows: number)


def example(row: Any) -> TextExample:
    n = row["n"]
    return TextExample((Segment(f"{n} is", False), Segment(" " + "x" * (n % 23), True)))


def encode(tokenizer: Any, to_example: Any = example, progress: Any = None) -> EncodedSplit:
    return encode_split(SPLIT, to_example, tokenizer, 20, progress or (lambda rows: None))


def children() -> list[Any]:
    return multiprocessing.active_children()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_tokens_do_not_depend_on_the_number_of_processes(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    plain = encode(tokenizer)
    processes(number, monkeypatch)
    done: list[int] = []
    found = encode(tokenizer, progress=done.append)
    for name in ("input_ids", "loss_mask", "offsets"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
    assert (found.counts.truncated_rows, found.counts.cut_completions) == (
        plain.counts.truncated_rows, plain.counts.cut_completions,
    )  # fmt: skip
    assert plain.counts.cut_completions
    assert done == sorted(done)
    assert done[-1] == 3500
    assert not children()


def test_labels_and_types_from_several_processes(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)

    def to_example(row: Any) -> ClassificationExample:
        return ClassificationExample(str(row["n"]), "ab", row["n"] / 7)

    plain = encode(tokenizer, to_example)
    processes(3, monkeypatch)
    found = encode(tokenizer, to_example)
    assert found.labels == plain.labels == tuple(n / 7 for n in range(3500))
    assert found.token_type_ids is not None
    np.testing.assert_array_equal(found.token_type_ids, plain.token_type_ids)


def test_bad_rows_in_several_processes_are_skipped(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process has only bad rows."""

    def refuse(row: Any) -> TextExample:
        if row["n"] < 1200 or row["n"] == 3000:
            raise DataError("refused")
        return example(row)

    plain = encode_split(SPLIT, refuse, tokenizer, 20, skip_bad=True)
    processes(3, monkeypatch)
    found = encode_split(SPLIT, refuse, tokenizer, 20, skip_bad=True)
    for name in ("input_ids", "loss_mask", "offsets"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
    assert found.counts == plain.counts
    assert found.counts.skipped_rows == 1201
    assert found.counts.skipped == [(n, "refused") for n in range(5)]
    assert len(found) == 3500 - 1201


@pytest.mark.parametrize("bad", [{3499, 1300, 2400}, {5, 3499}, {3499}])
def test_the_earliest_bad_row_is_named(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, bad: set[int]
) -> None:
    def refuse(row: Any) -> TextExample:
        if row["n"] in bad:
            raise DataError("refused")
        if row["n"] < 1166:
            time.sleep(0.0002)  # the first process is the last to know
        return example(row)

    processes(3, monkeypatch)
    with pytest.raises(DataError, match=rf"^rows\.jsonl, row {min(bad) + 1}: refused$"):
        encode(tokenizer, refuse)
    assert not children()


def test_internal_errors_and_killed_processes_are_reported(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(row: Any) -> TextExample:
        raise ZeroDivisionError("in the task")

    def killed(row: Any) -> TextExample:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    processes(2, monkeypatch)
    with pytest.raises(
        LorakitError, match=r"(?s)tokenization process failed: .*broken.*in the task"
    ):
        encode(tokenizer, broken)
    with pytest.raises(LorakitError, match="tokenization process failed: killed, exit code -9"):
        encode(tokenizer, killed)
    assert not children()


def test_the_environment_is_restored(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processes(2, monkeypatch)
    for value in ("true", None):
        if value is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM")
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        encode(tokenizer)
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one process tokenizes")
def test_process_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert [shards.process_count(n) for n in (10, 19_999, 20_000, 45_000, 10**6)] == [1, 1, 2, 4, 8]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert shards.process_count(10**6) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_processes_and_no_files(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def slow(row: Any) -> TextExample:
        time.sleep(0.01)
        return example(row)

    processes(2, monkeypatch)
    monkeypatch.setattr(shards, "BATCH_ROWS", 10)
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=encode, args=(tokenizer, slow, theirs.send))
    process.start()
    ours.recv()
    assert process.pid is not None
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    workers = [Path(f"/proc/{pid}") for pid in listed.split()]
    assert len(workers) == 2
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode
    deadline = time.monotonic() + 20
    while any(_runs(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [worker for worker in workers if _runs(worker)]
    assert not list(tmp_path.iterdir())


def _runs(process: Path) -> bool:
    try:
        return "\nState:\tZ" not in (process / "status").read_text()
    except OSError:
        return False
