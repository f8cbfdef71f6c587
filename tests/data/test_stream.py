"""A stream yields the rows of its files, shuffled, in steps that depend on rows and seed alone."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from transformers import AutoTokenizer

from lorakit.data.encode import EncodedRow, encode_split
from lorakit.data.examples import ChatExample, ClassificationExample, Segment, TextExample
from lorakit.data.sources import load_split
from lorakit.data.stream import HEAD_ROWS, Stream, open_stream
from lorakit.data.stream_steps import StreamEncoder, StreamSteps, shuffled
from lorakit.errors import DataError

ROWS = [{"id": f"{n:04}", "text": "x" * (n % 30)} for n in range(700)]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def write(file: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if file.name.endswith(".parquet"):
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(file)
    elif file.suffix == ".arrow":
        found = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_file(file, found.schema) as writer:  # not a stream, as in test_rows
            writer.write_table(found)
    elif file.suffix in (".csv", ".tsv"):
        tab = "\t" if file.suffix == ".tsv" else ","
        file.write_text("".join(f"{tab.join(cells)}\n" for cells in table(rows)))
    else:
        file.write_bytes(gzip.compress(lines.encode()) if file.suffix == ".gz" else lines.encode())
    return file


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def stream_of(path: Any, limit: int | None = None) -> Stream:
    found = open_stream(path, "train", limit=limit)
    assert found is not None
    return found


def example(row: Any) -> TextExample:
    return TextExample((Segment(row["text"] + ":", False), Segment(row["id"], True)))


def steps_of(stream: Stream, tokenizer: Any, **changes: Any) -> StreamSteps:
    encoder = StreamEncoder(
        changes.pop("to_example", example), tokenizer, 25, changes.pop("embedding_rows", 1000)
    )
    settings: dict[str, Any] = {
        "per_device_batch_size": 2,
        "micro_batches_per_step": 2,
        "seed": 3,
        "buffer_rows": 100,
        "group_by_length": True,
    }
    return StreamSteps(stream, encoder, **{**settings, **changes})


def ids(row: EncodedRow, tokenizer: Any) -> str:
    return str(tokenizer.decode(row.input_ids[row.loss_mask]))[:4]


def numbers(steps: StreamSteps, tokenizer: Any, which: range) -> list[list[str]]:
    return [[ids(row, tokenizer) for row in steps.step(number).rows] for number in which]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet", "a.arrow"]
)
def test_rows_are_those_of_the_split(tmp_path: Path, name: str) -> None:
    files = [str(write(tmp_path / name)), str(write(tmp_path / f"b{name}", ROWS[:3]))]
    stream, split = stream_of(files), load_split(files, "train")
    assert split is not None
    located = list(stream.read())
    assert [row.row for row in located] == [dict(row) for row in split.rows]
    assert [str(row) for row in located] == [split.locate(index) for index in range(len(split))]
    assert [row.row for row in stream.read()] == [row.row for row in located]
    assert len(stream.head) == HEAD_ROWS + 3
    assert stream.head.columns == split.columns
    assert stream.head.locate(HEAD_ROWS + 1) == f"{files[1]}, row 2"
    assert len(list(stream_of(files, limit=11).read())) == 11


def test_a_column_that_first_occurs_late_is_read(tmp_path: Path) -> None:
    rows = [{"id": "0"}, *ROWS, {"id": "1", "late": 1}, {"id": "2", "text": ""}]
    files = [str(write(tmp_path / "a.jsonl", rows)), str(write(tmp_path / "b.jsonl", [{"x": 1}]))]
    stream = stream_of(files)
    assert stream.head.columns == ("id", "text", "x")
    read = [located.row for located in stream.read()]
    assert read[0] == {"id": "0", "text": None, "x": None}
    assert read[-3:] == [
        {"id": "1", "text": None, "x": None, "late": 1},
        {"id": "2", "text": "", "x": None},
        {"id": None, "text": None, "x": 1},
    ]


def test_the_heads_of_many_files_are_shorter(tmp_path: Path) -> None:
    files = [str(write(tmp_path / f"{n}.jsonl", ROWS[:50])) for n in range(150)]
    stream = stream_of(files)
    assert len(stream.head) == 150 * 26
    assert sum(1 for _ in stream.read()) == 150 * 50


def test_unreadable_streams(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^task\.path: .*: no such file"):
        stream_of(str(tmp_path / "none.jsonl"))
    (tmp_path / "b.csv").write_text("id,text\n")
    with pytest.raises(DataError, match=r"b\.csv: the split 'train' is empty"):
        stream_of(str(tmp_path / "b.csv"))
    file = write(tmp_path / "a.jsonl")
    with file.open("a") as out:
        out.write("not JSON\n")
    with pytest.raises(DataError, match=r"a\.jsonl, row 701: not JSON"):
        list(stream_of(str(file)).read())
    with pytest.raises(DataError, match=r"^task\.path = null: "):
        open_stream(None, "train")
    assert open_stream(str(tmp_path), "train") is None


def test_rows_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x"}\n' * 3 + "not JSON\n")
    stream = stream_of(str(file), limit=3)
    assert len(stream.head) == len(list(stream.read())) == 3


def test_a_file_that_changes_ends_the_stream(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl")
    stream = stream_of(str(file))
    passing = stream.read()
    next(passing)
    write(file, ROWS[:300])
    for rows in (passing, stream.read()):
        with pytest.raises(DataError, match=r"a\.jsonl: the file has changed"):
            list(rows)
    file.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read"):
        list(stream.read())


def test_the_fingerprint_depends_on_head_and_sizes(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    prints = [
        stream_of(str(write(file, rows))).head.fingerprint
        for rows in (ROWS, ROWS, [*ROWS, {"id": "x"}], [ROWS[1], ROWS[0], *ROWS[2:]])
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    stream = open_stream(None, "train", hub=(str(tmp_path), None))
    assert stream is not None
    assert [row.row for row in stream.read()] == ROWS
    assert open_stream(None, "test", hub=(str(tmp_path), None)) is None
    with pytest.raises(DataError, match="cannot load the Hub dataset 'no/where'"):
        open_stream(None, "train", hub=("no/where", None))


def test_each_pass_is_shuffled_differently(tmp_path: Path) -> None:
    stream = stream_of(str(write(tmp_path / "a.jsonl")))

    def order(seed: int, buffer: int, rows: int = 1400) -> list[int]:
        return [int(row.located.row["id"]) for row in islice(shuffled(stream, seed, buffer), rows)]

    first, second = order(1, 100)[:700], order(1, 100)[700:]
    assert sorted(first) == sorted(second) == list(range(700))
    assert first != second
    assert order(1, 100)[:700] == first != order(2, 100)[:700]
    assert max(number - place for place, number in enumerate(first)) <= 100
    assert order(1, 1, 700) == list(range(700))
    assert sorted(order(1, 10_000, 700)) == list(range(700))


@pytest.mark.parametrize("grouped", [True, False])
def test_steps_have_every_row_of_a_pass_once(tmp_path: Path, tokenizer: Any, grouped: bool) -> None:
    stream = stream_of(str(write(tmp_path / "a.jsonl")))
    steps = steps_of(stream, tokenizer, group_by_length=grouped)
    assert steps.steps_per_epoch is None
    found = [steps.step(number) for number in range(350)]
    assert all([len(batch) for batch in step.micro_batches] == [2, 2] for step in found)
    seen = [ids(row, tokenizer) for step in found for row in step.rows]
    assert sorted(seen) == sorted(2 * [row["id"] for row in ROWS])
    spans = [np.ptp([len(row.input_ids) for row in step.rows]) for step in found]
    assert (np.mean(spans) < 2) == grouped


def test_rows_are_encoded_as_in_a_split(tmp_path: Path, tokenizer: Any) -> None:
    file = str(write(tmp_path / "a.jsonl"))
    split = load_split(file, "train")
    assert split is not None
    encoded = encode_split(split, example, tokenizer, 25)
    steps = steps_of(stream_of(file), tokenizer)
    rows = [row for number in range(200) for row in steps.step(number).rows]
    for row in rows:
        wanted = encoded[int(ids(row, tokenizer))]
        assert row.input_ids.tolist() == wanted.input_ids.tolist()
        assert row.loss_mask.tolist() == wanted.loss_mask.tolist()
    assert steps.rows == steps.counts.rows == len(split)  # of the first pass
    assert steps.counts.truncated_rows > steps.counts.cut_completions == 0


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("jump", [1, 50, 77, 260])
def test_skipping_ahead_gives_the_same_steps(
    tmp_path: Path, tokenizer: Any, jump: int, packed: bool
) -> None:
    def pairs(rows: list[EncodedRow]) -> list[list[EncodedRow]]:
        return [rows[start : start + 2] for start in range(0, len(rows), 2)]

    stream = stream_of(str(write(tmp_path / "a.jsonl")))
    bins = pairs if packed else None
    whole = steps_of(stream, tokenizer, bins=bins)
    expected = numbers(whole, tokenizer, range(jump + 5))[jump:]
    resumed = steps_of(stream, tokenizer, bins=bins)
    assert numbers(resumed, tokenizer, range(jump, jump + 5)) == expected
    assert {len(step) for step in expected} == {8 if packed else 4}
    if not packed:
        assert resumed.rows < 800, "what is passed over is not tokenized"


def test_bad_rows_are_named(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*ROWS[:500], {"id": "0500", "text": None}, *ROWS[501:]]
    stream = stream_of(str(write(tmp_path / "a.jsonl", rows)))

    def refuse(row: Any) -> TextExample:
        if row["text"] is None:
            raise DataError("no text")
        return example(row)

    steps = steps_of(stream, tokenizer, to_example=refuse)
    with pytest.raises(DataError, match=r"^.*a\.jsonl, row 501: no text$"):
        numbers(steps, tokenizer, range(200))


def test_ids_outside_of_the_embedding(tmp_path: Path, tokenizer: Any) -> None:
    stream = stream_of(str(write(tmp_path / "a.jsonl")))
    with pytest.raises(DataError, match="but the model has 10 embeddings"):
        steps_of(stream, tokenizer, embedding_rows=10).step(0)


def test_labels_of_an_encoder(tmp_path: Path, tiny_bert: Path) -> None:
    def labelled(row: Any) -> ClassificationExample:
        return ClassificationExample(row["id"], row["text"], len(row["text"]) % 3)

    stream = stream_of(str(write(tmp_path / "a.jsonl")))
    steps = steps_of(stream, AutoTokenizer.from_pretrained(tiny_bert), to_example=labelled)
    step = steps.step(0)
    assert all(row.label in (0, 1, 2) and row.token_type_ids is not None for row in step.rows)
    assert step.loss_count == 4


def test_chats_that_become_several_rows(tmp_path: Path, tiny_llama: Path) -> None:
    """Skipping ahead gives the same steps as reading one by one, and each turn is trained once."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '!' if loop.last and m.role == 'assistant' }}{{ m.content }}</s>"
        "{% endfor %}"
    )

    def chat(row: Any) -> ChatExample:
        turns = int(row["id"]) % 3 + 1
        return ChatExample(tuple(
            {"role": role, "content": f"{row['id']}{turn}"}
            for turn in range(turns) for role in ("user", "assistant")
        ))  # fmt: skip

    stream = stream_of(str(write(tmp_path / "a.jsonl", ROWS[:60])))
    made = {"to_example": chat, "group_by_length": False, "buffer_rows": 10}
    steps = steps_of(stream, tokenizer, **made)
    texts = [
        tokenizer.decode(row.input_ids[row.loss_mask])
        for number in range(30)
        for row in steps.step(number).rows
    ]
    wanted = [f"!{n:04}{turn}</s>" for n in range(60) for turn in range(n % 3 + 1)]
    assert sorted(texts) == sorted(wanted)
    jumped = steps_of(stream, tokenizer, **made)
    found = [tokenizer.decode(row.input_ids[row.loss_mask]) for row in jumped.step(17).rows]
    assert found == texts[17 * 4 : 18 * 4]
    assert (steps.rows, steps.counts.rows) == (120, 60)
    assert steps.counts.notes["chats"] == 60
    assert steps.counts.notes["rows_of_split_chats"] == 100
