"""JSON as it occurs in practice: arrays, an object per line, concatenated objects."""

from __future__ import annotations

import gzip
import io
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import json_text
from lorakit.data.sources import load_split
from lorakit.data.stream import open_stream
from lorakit.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"text": 'a "quoted" \\ text, ], [ and }', "label": 0},
    {"text": "é \u2028 \U0001f600", "label": 1},
    {"text": "", "label": [{"x": None}, 1.5e3]},
]
FILE = Path("rows.json")
ARRAYS = {
    "one line": json.dumps(ROWS),
    "indented": json.dumps(ROWS, indent=4, ensure_ascii=False),
    "a row a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "byte order mark": "\ufeff \r\n" + json.dumps(ROWS, indent=1).replace("\n", "\r\n"),
}
OBJECTS = {
    "lines": "\n".join(map(json.dumps, ROWS)),
    "lines with blank ones": "\ufeff" + "\r\n \r\n".join(map(json.dumps, ROWS)) + "\r\n",
    "indented": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "nothing between": "".join(map(json.dumps, ROWS)),
}


def write(file: Path, text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return str(file)


def both_ways(path: Any) -> list[dict[str, Any]]:
    """The rows, equal whether loaded or streamed, as are their locations."""
    split, stream = load_split(path, "train"), open_stream(path, "train")
    assert split is not None
    assert stream is not None
    rows, streamed = [dict(row) for row in split.rows], list(stream.read())
    assert [located.row for located in streamed] == rows
    assert [str(located) for located in streamed] == [split.locate(i) for i in range(len(rows))]
    return rows


def refusal(path: Any) -> str:
    """The same error whether loaded or streamed."""
    told = []
    for read in (load_split, lambda path, split: list(open_stream(path, split).read())):  # type: ignore[union-attr]
        with pytest.raises(DataError) as caught:
            read(path, "train")
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert "\n" not in told[0]
    return told[0]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("form", ARRAYS)
def test_arrays(
    tmp_path: Path, name: str, form: str, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr("lorakit.data.rows.IN_MEMORY_BYTES", 16)
    assert both_ways(write(tmp_path / name, ARRAYS[form])) == ROWS


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("form", OBJECTS)
def test_json_files_without_an_array(
    tmp_path: Path, name: str, form: str, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr("lorakit.data.rows.IN_MEMORY_BYTES", 16)
    assert both_ways(write(tmp_path / name, OBJECTS[form])) == ROWS


def test_a_key_missing_from_some_elements(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", '[{"a": 1}, {}, {"b": 2}]')
    assert both_ways(file) == [{"a": 1, "b": None}, {"a": None, "b": None}, {"a": None, "b": 2}]


def test_arrays_and_lines_together(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "a.json", ARRAYS["indented"]),
        write(tmp_path / "b.jsonl", OBJECTS["lines"]),
        write(tmp_path / "c.csv", "text,label\nx,1\n"),
    ]
    assert both_ways(files) == [*ROWS, *ROWS, {"text": "x", "label": "1"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"a": 1}, 5]', ", row 2: not a JSON object"),
        ('[{"a": 1}, [2]]', ", row 2: not a JSON object"),
        ("[null]", ", row 1: not a JSON object"),
        ('[{"a": 1}, {"a": }]', ", row 2: not JSON: Expecting value at character 7"),
        ('[{"a": 1}, {"a": 1]', ", row 2: not JSON: Expecting ',' delimiter at character 8"),
        ('[{"a": 1},]', ", row 2: not JSON: Expecting value at character 1 of the row"),
        ('[{"a": 1} {"a": 2}]', ", row 1: not JSON: '{' after the value; allowed: ',' or ']'"),
        ('[{"a": 1}, {"a": 2}', ", row 2: not JSON: the end of the file after the value"),
        ('[{"a": 1}, {"a": "x', ", row 2: not JSON: Unterminated string"),
        ('[{"a": 1},', ", row 2: not JSON: Expecting value"),
        ("[", ", row 1: not JSON: Expecting value"),
        ('[{"a": 1}] x', ": text after the end of the array; allowed: an array of objects"),
        ('[{"a": 1}]\n[{"a": 2}]', ": text after the end of the array"),
        ('[{"a": "\\ud83d"}]', ", row 1: lone surrogate"),
        (b'[{"a": 1}, {"a": "caf\xe9"}]', ", row 2: not UTF-8"),
        ("[]", ": the split 'train' is empty"),
        (" [\n ]\n", ": the split 'train' is empty"),
        (" \n", ": the split 'train' is empty"),
        ("[{}, {}]", ": every row is an empty object"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_bad_arrays(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    file = write(tmp_path / name, content)
    assert refusal(file).startswith(f"{file}{expected}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": 1}\n{"a": \n', ", row 2: not JSON: Expecting value"),
        ('{"a": 1}\n7\n', ", row 2: not a JSON object"),
        ('"a"', ", row 1: not a JSON object"),
        ('{"a": 1},\n{"a": 2}', ", row 2: not JSON: Expecting value"),
        ("text", ", row 1: not JSON"),
        ('{"data": [{"a": 1}, {"a": 2}]}', ": a single object with the rows in 'data'"),
        (
            '{\n "version": 1,\n "rows": [\n  {"a": 1}\n ]\n}',
            ": a single object with the rows in 'rows'",
        ),
        ('{"a": ["x", "y"], "b": [0, 1]}', ": a single object with a list per column; allowed: an"),
        ('{"a": {"0": "x"}, "b": {"0": 1}}', ": a single object with a list per column; allowed:"),
    ],
)
def test_bad_objects(tmp_path: Path, content: str, expected: str) -> None:
    file = write(tmp_path / "a.json", content)
    assert refusal(file).startswith(f"{file}{expected}")


def test_a_single_object_may_be_a_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in ({"messages": turns, "tools": [{"x": 1}, {"x": 2}]}, {"prompt": "a", "n": 1}):
        assert both_ways(write(tmp_path / "a.json", json.dumps(row, indent=1))) == [row]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings(tmp_path: Path, name: str, encoding: str) -> None:
    text = '{"text": "x"}\n' if "json" in name else "text\nx\n"
    file = write(tmp_path / name, text.encode(encoding))
    assert refusal(file) == f"{file}: the text is UTF-16 or UTF-32; allowed: UTF-8"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_a_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    file = write(tmp_path / name, pointer)
    assert (
        refusal(file) == f"{file}: a Git LFS pointer, not the data itself; hint: run git lfs pull"
    )


def test_packed_tables(tmp_path: Path) -> None:
    comma = write(tmp_path / "a.csv.gz", '\ufefftext,label\r\n"x, y",1\r\n')
    tab = write(tmp_path / "b.tsv.gz", "label\ttext\n2\tz\n")
    assert both_ways([comma, tab]) == [
        {"text": "x, y", "label": "1"},
        {"text": "z", "label": "2"},
    ]
    (tmp_path / "c.csv.gz").write_bytes(b"no gzip")
    assert "c.csv.gz: cannot be read: " in refusal(str(tmp_path / "c.csv.gz"))


# Read in chunks


def random_value(generator: random.Random, depth: int = 0) -> Any:
    kind = generator.randint(0, 6 if depth < 3 else 3)
    if kind < 2:
        return generator.choice([None, True, False, -1, 12345, 1.5, -2e-7, float("inf")])
    if kind < 4:
        return "".join(generator.choices('ab"\\\n\té\U0001f600/ ', k=generator.randint(0, 9)))
    if kind == 4:
        return [random_value(generator, depth + 1) for _ in range(generator.randint(0, 3))]
    keys = [random_value(generator, 3) for _ in range(generator.randint(0, 3))]
    return {str(key): random_value(generator, depth + 1) for key in keys}


def outcome(data: bytes) -> Any:
    """The rows of ``data``, or the place that an error names."""
    try:
        pieces = list(json_text.pieces(FILE, io.BytesIO(data), by_line=False))
    except DataError as error:
        return str(error).split(":")[0]
    assert b"".join(piece for piece, _ in pieces) == data, "every byte is in a piece"
    for piece, row in pieces:
        if row is not None:
            assert json.JSONDecoder().raw_decode(piece.decode())[0] == row
    return [row for _, row in pieces if row is not None]


@pytest.mark.parametrize("seed", range(60))
def test_results_do_not_depend_on_the_chunk_size(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even for truncated or broken files the result does not depend on the chunk size and equals
    that of the json module."""
    generator = random.Random(seed)
    rows = [{f"k{n}": random_value(generator) for n in range(generator.randint(1, 3))}
            for _ in range(generator.randint(0, 4))]  # fmt: skip
    indent, ascii_only = generator.choice([None, 0, 2, 40]), seed % 2 == 0
    whole = f" {json.dumps(rows, indent=indent, ensure_ascii=ascii_only)}\r\n".encode()
    broken = bytearray(whole)
    broken[generator.randrange(2, len(broken))] = generator.randrange(256)
    cut = whole[: generator.randrange(2, len(whole))]
    each = b"\n".join(json.dumps(row, indent=indent).encode() for row in [*rows, {"a": 1}, {}])
    for data in (whole, bytes(broken), cut):
        found = []
        for size in (1, 7, 1 << 20):
            monkeypatch.setattr(json_text, "CHUNK", size)
            found.append(outcome(data))
        assert found[0] == found[1] == found[2]
        assert found[0] == expected(data) or (isinstance(found[0], str) and expected(data) is None)
    for size in (1, 7, 1 << 20):
        monkeypatch.setattr(json_text, "CHUNK", size)
        assert outcome(each) == [*rows, {"a": 1}, {}]


def expected(data: bytes) -> Any:
    try:
        rows = json.loads(data)
    except ValueError:
        return None
    return rows if all(isinstance(row, dict) for row in rows) else None


@pytest.mark.parametrize("indent", [None, 1])
def test_a_large_array_is_not_kept_as_objects(
    tmp_path: Path, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.data.rows.IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(json_text, "CHUNK", 1 << 16)
    rows = [{"text": f"row {n} {'x' * 200}", "list": [n] * 20} for n in range(10_000)]
    file = write(tmp_path / "a.json", json.dumps(rows, indent=indent))
    size = Path(file).stat().st_size
    assert size > 3e6
    tracemalloc.start()
    split = load_split(file, "train")
    assert split is not None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 4
    assert (len(split), split.rows[9_999]) == (10_000, rows[-1])


def test_a_value_without_end_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_text, "LARGEST_ROW", 3 << 20)
    file = write(tmp_path / "a.json", json.dumps({"data": [{"text": "x" * 99}] * 100_000}))
    expected = f"{file}, row 1: not JSON: no end within 3 MiB; allowed: an array of objects"
    assert refusal(file).startswith(expected)


def test_reading_stops_at_an_error(tmp_path: Path) -> None:
    class Counted(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.taken += len(data)
            return data

    row = b'{"text": "' + b"x" * 100 + b'"}, '
    handle = Counted(b"[" + row * 1000 + b'{"text" 1}, ' + row * 200_000 + b"{}]")
    with pytest.raises(DataError, match=r"rows\.json, row 1001: not JSON: Expecting ':'"):
        list(json_text.pieces(FILE, handle, by_line=False))
    assert handle.taken <= 2 << 20


TWICE = [
    '{"prompt": "a", "prompt": "b"}',
    '{"prompt":"a","completion":"c","prompt":"a"}',
    '{"prompt" : "a", "prompt": "b"}',
    '{"messages": [{"role": "user", "content": "a", "content": "\\"x\\": 1"}]}',
    '{"a": {"b": 1, "b": 2}, "c": [1, {"d": []}]}',
]
ONCE = [
    '{"prompt": "{\\"a\\": 1, \\"a\\": 2}", "completion": "\\" :"}',
    '{"a"   :  1, "b": [[{"a": 1}, {"a": {}}], []]}',
    '{"a": "\\"a\\": "}',
]


@pytest.mark.parametrize("form", ["lines", "objects", "array"])
def test_a_duplicate_key(tmp_path: Path, form: str) -> None:
    """The first value would be lost silently."""
    file = tmp_path / ("a.jsonl" if form == "lines" else "a.json")

    def write(*objects: str) -> None:
        whole = f"[{', '.join(objects)}]" if form == "array" else "\n".join(objects)
        file.write_text(whole, encoding="utf-8-sig")

    for text in TWICE:
        write(*ONCE, text)
        with pytest.raises(DataError) as caught:
            load_split(str(file), "train")
        assert str(caught.value).startswith(f"{file}, row {len(ONCE) + 1}: duplicate key ")
        assert str(caught.value).endswith("; allowed: each key once")
    write(*ONCE)
    found = load_split(str(file), "train")
    assert found is not None
    assert [row["a"] for row in found.rows] == [None, 1, '"a": ']
