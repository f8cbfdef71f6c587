"""Several processes tokenize a stream together, and make the steps that one process makes. Threads
stand in for the processes."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorakit.data.encode import EncodedRow
from lorakit.data.examples import ChatExample, ClassificationExample, Segment, TextExample
from lorakit.data.plan import Share, Step
from lorakit.data.stream import LocatedRow, SkippedRows, Stream, open_stream
from lorakit.data.stream_steps import StreamEncoder, StreamSteps
from lorakit.errors import DataError

ROWS = [{"id": f"{n:04}", "text": "x" * (n * 7 % 30)} for n in range(700)]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def stream_of(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Stream:
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = open_stream(str(file), "train")
    assert stream is not None
    return stream


def example(row: Any) -> Any:
    return TextExample((Segment(row["text"] + ":", False), Segment(row["id"], True)))


def steps_of(stream: Stream, tokenizer: Any, to_example: Any = example, **more: Any) -> StreamSteps:
    encoder = StreamEncoder(to_example, copy.deepcopy(tokenizer), 25, 1000)
    settings = {
        "per_device_batch_size": 1, "micro_batches_per_step": 6, "seed": 3, "buffer_rows": 100,
        "group_by_length": True,
    } | more  # fmt: skip
    return StreamSteps(stream, encoder, **settings)


class Processes:
    """Exchanges what ``count`` threads pass to ``gather``."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._sent: list[bytes] = [b""] * count
        self._barrier = threading.Barrier(count)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._sent[rank] = pickle.dumps(value)
        self._barrier.wait(60)
        found = [pickle.loads(each) for each in self._sent]  # noqa: S301
        self._barrier.wait(60)
        return found

    def run(self, work: Any) -> list[Any]:
        """What ``work(rank, sharing)`` returns, or the error that it raises, for each rank."""

        def run(rank: int) -> Any:
            sharing = {
                "share": Share(rank, self.count), "gather": lambda value: self.gather(rank, value)
            }  # fmt: skip
            try:
                return work(rank, sharing)
            except DataError as error:
                return error
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(run, range(self.count)))


def as_values(rows: list[EncodedRow]) -> list[Any]:
    return [
        (row.input_ids.tolist(), row.loss_mask.tolist(), row.label,
         None if row.token_type_ids is None else row.token_type_ids.tolist())
        for row in rows
    ]  # fmt: skip


def batches(step: Step) -> list[Any]:
    return [[as_values(unit) for unit in batch] for batch in step.micro_batches]


def pairs(rows: list[EncodedRow]) -> list[list[EncodedRow]]:
    return [rows[start : start + 2] for start in range(0, len(rows), 2)]


def labelled(row: Any) -> Any:
    return ClassificationExample(row["id"], row["text"], len(row["text"]) % 3)


def chat(row: Any) -> Any:
    turns = int(row["id"]) % 3 + 1
    return ChatExample(tuple(
        {"role": role, "content": f"{row['id'][2:]}{turn}"}
        for turn in range(turns) for role in ("user", "assistant")
    ))  # fmt: skip


VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "grouped": (example, {}),
    "packed": (example, {"bins": pairs}),
    "labelled": (labelled, {}),
    "chats": (chat, {"group_by_length": False}),
}


@pytest.mark.parametrize(("processes", "first"), [(2, 77), (3, 0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_steps_are_those_of_one_process(
    tiny_bert: Path, tokenizer: Any, tmp_path: Path, processes: int, variant: str, first: int
) -> None:
    """From the start, and resumed in a later window."""
    to_example, settings = VARIANTS[variant]
    if variant == "labelled":
        tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    numbers = range(first, first + 60)
    stream = stream_of(tmp_path)

    def run(rank: int, sharing: dict[str, Any]) -> Any:
        steps = steps_of(stream, tokenizer, to_example, **settings, **sharing)
        found = [steps.step(number) for number in numbers]
        counts = [(step.loss_count, step.tokens) for step in found]
        return [batches(step) for step in found], counts, steps.rows, steps.rows_read, steps.counts

    whole, *wanted = run(0, {})
    found = Processes(processes).run(run)
    for rank, (own, *values) in enumerate(found):
        assert own == [step[rank::processes] for step in whole]
        assert values == wanted


def test_each_row_is_tokenized_by_one_process(tokenizer: Any, tmp_path: Path) -> None:
    """All of them see it."""
    stream = stream_of(tmp_path)
    encoded: list[Any] = []

    def counted(row: Any) -> Any:
        encoded.append(row)
        return example(row)

    def run(rank: int, sharing: dict[str, Any]) -> int:
        seen: list[Any] = []
        steps = steps_of(stream, tokenizer, counted, watch=seen.append, **sharing)
        for number in range(101):
            steps.step(number)
        return len(seen)

    windows = 3 * 300  # and another one, which is read ahead
    found = Processes(3).run(run)
    assert all(windows <= seen <= windows + 300 for seen in found)
    first = 3  # whose kind each process looks at
    assert windows <= len(encoded) - first <= windows + 300


BAD = {30: None, 90: "", 300: None, 301: "", 500: None, 501: "", 650: None}


def picky(row: Any) -> Any:
    """Refuses a text that is None; one that is empty has nothing to train on."""
    if row["text"] is None:
        raise DataError("no text")
    return TextExample((Segment(row["text"] + ":", False), Segment(row["id"], row["text"] != "")))


def bad_rows(*numbers: int) -> list[dict[str, Any]]:
    return [row | ({"text": BAD[n]} if n in numbers else {"text": f"{n:02}"})
            for n, row in enumerate(ROWS)]  # fmt: skip


def test_skipped_rows_are_reported_as_by_one_process(tokenizer: Any, tmp_path: Path) -> None:
    stream = stream_of(tmp_path, bad_rows(*BAD))

    def run(rank: int, sharing: dict[str, Any]) -> Any:
        said: list[str] = []
        skipped = SkippedRows("train", said.append)
        steps = steps_of(stream, tokenizer, picky, skipped=skipped, **sharing)
        found = [steps.step(number).tokens for number in range(150)]
        return found, said, len(skipped), steps.rows_read

    wanted = run(0, {})
    assert wanted[2] == len(BAD)
    assert Processes(2).run(run) == [wanted] * 2


@pytest.mark.parametrize("bad", [(30, 500), (90, 500), (650,), (301, 501, 650)])
def test_an_error_is_that_of_one_process(tokenizer: Any, tmp_path: Path, bad: Any) -> None:
    """Even where a row's text is refused after the tokens of an earlier one were."""
    stream = stream_of(tmp_path, bad_rows(*bad))

    def run(rank: int, sharing: dict[str, Any]) -> Any:
        steps = steps_of(stream, tokenizer, picky, **sharing)
        for number in range(150):
            steps.step(number)

    with pytest.raises(DataError) as caught:
        run(0, {})
    assert [str(error) for error in Processes(3).run(run)] == [str(caught.value)] * 3


def test_a_failure_of_one_process_is_raised_in_all(tokenizer: Any, tmp_path: Path) -> None:
    stream = stream_of(tmp_path)

    def failing() -> Any:
        rows = stream.read()
        for _ in range(650):
            yield next(rows)
        raise DataError("b.jsonl: the file is gone")

    def run(rank: int, sharing: dict[str, Any]) -> Any:
        own = replace(stream, read=failing) if rank == 1 else stream
        steps = steps_of(own, tokenizer, **sharing)
        for number in range(150):
            steps.step(number)

    assert [str(error) for error in Processes(3).run(run)] == ["b.jsonl: the file is gone"] * 3


def test_rows_of_any_type_can_be_skipped(tokenizer: Any, tmp_path: Path) -> None:
    """Other processes receive the place of a skipped row, not its columns."""
    stream = stream_of(tmp_path)

    def rows() -> Any:
        for located in stream.read():
            yield LocatedRow(located.source, located.number, {**located.row, "x": lambda: None})

    def refuse(row: Any) -> Any:
        if row["id"] == "0030":
            raise DataError("no")
        return example(row)

    def run(rank: int, sharing: dict[str, Any]) -> Any:
        said: list[str] = []
        skipped = SkippedRows("train", said.append)
        own = replace(stream, read=rows)
        steps_of(own, tokenizer, refuse, skipped=skipped, **sharing).step(0)
        return said

    wanted = f"train: row skipped (task.on_bad_row: skip): {stream.head.locate(30)}: no"
    assert Processes(2).run(run) == [[wanted]] * 2
