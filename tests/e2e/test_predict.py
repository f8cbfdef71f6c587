"""``lorakit predict``: files in and out, options, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import lorakit
from lorakit.cli.main import run
from tests.e2e.evaluations import write_adapter
from tests.tasks.wikisql_files import write_lines

TEXTS = ["short", "the longest of all of these texts, by far", "NA", 'a, "quoted" text', "é"]


@pytest.fixture(scope="module")
def adapter(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes") / "adapter"
    write_adapter(tiny_bert, folder, "encoder", ["bad", "good"])
    return folder


@pytest.fixture(scope="module")
def wanted(adapter: Path) -> list[dict[str, Any]]:
    return lorakit.predict(adapter, TEXTS)


def predicted(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    code = run(["predict", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(["predict", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


def write_texts(folder: Path, name: str) -> Path:
    """Write TEXTS and a column of numbers in the format of the name."""
    file = folder / name
    rows = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    if name.endswith(".jsonl"):
        write_lines(file, rows)
    elif name.endswith(".json.gz"):
        file.write_bytes(gzip.compress(json.dumps(rows).encode()))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif name.endswith(".tsv"):
        file.write_text("".join(f"{a}\t{b}\n" for a, b in [("id", "text"), *enumerate(TEXTS)]))
    else:
        with file.open("w", newline="") as handle:
            csv.writer(handle).writerows([("id", "text"), *enumerate(TEXTS)])
    return file


@pytest.mark.parametrize("name", ["in.csv", "in.tsv", "in.jsonl", "in.json.gz", "in.parquet"])
def test_every_format_gives_the_same_in_the_same_order(
    adapter: Path,
    wanted: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    file = write_texts(tmp_path, name)
    out, _ = predicted(capsys, adapter, "--input", file)
    assert [json.loads(line) for line in out.splitlines()] == wanted
    out, err = predicted(capsys, adapter, "--input", file, "--output", tmp_path / "out.jsonl")
    assert out == ""
    assert err.endswith(f"{tmp_path / 'out.jsonl'}: 5 predictions\n")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out.jsonl"])


def test_csv_output(
    adapter: Path,
    wanted: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, output = write_texts(tmp_path, "in.csv"), tmp_path / "out.csv"
    predicted(capsys, adapter, "--input", file, "--output", output)
    with output.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == ["label", "score", "scores.bad", "scores.good"]
    for row, other in zip(rows, wanted, strict=True):
        assert row["label"] == other["label"]
        assert float(row["score"]) == other["score"]
        assert float(row["scores.bad"]) == other["scores"]["bad"]
    capsys.readouterr()
    many = tmp_path / "many"
    shutil.copytree(adapter, many)
    info = json.loads((many / "lorakit.json").read_text())
    info["problem_type"] = "multi_label_classification"
    (many / "lorakit.json").write_text(json.dumps(info))
    predicted(capsys, many, "--text", "a", "--output", output)
    with output.open(newline="") as handle:
        (row,) = csv.DictReader(handle)
    assert list(row) == ["label", "score", "labels", "scores.bad", "scores.good"]
    assert json.loads(row["labels"]) == lorakit.predict(many, "a")[0]["labels"]


def test_pairs_and_named_columns(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [json.dumps(row) for row in lorakit.predict(adapter, [("a", "b"), ("c", "d")])]
    out, _ = predicted(
        capsys, adapter, "--text", "a", "--text-pair", "b", "--text", "c", "--text-pair", "d"
    )
    assert out.splitlines() == wanted
    rows = [{"x": "a", "y": "b"}, {"x": "c", "y": "d"}]
    file = write_lines(tmp_path / "in.jsonl", rows)
    out, _ = predicted(
        capsys, adapter, "--input", file, "--text-column", "x", "--text-pair-column", "y"
    )
    assert out.splitlines() == wanted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", "id,text\n1,a\n2\n", "{file}, row 2: 1 cell; the header has 2"),
        (
            "in.jsonl",
            '{"text": "a"}\n{"text": 5}\n',
            "{file}, row 2: column 'text' = 5; allowed: t",
        ),
        ("in.jsonl", '{"text": "a"}\n{"x": "b"}\n', "{file}, row 2: column 'text' = null; allowed"),
        ("in.jsonl", '{"text": "a"}\n{\n', "{file}, row 2: not JSON"),
        ("in.csv", "a,b\n1,2\n", "{file}: cannot tell which column is the text; the columns are"),
        ("in.csv", "text\n", "{file}: the file has no rows"),
        ("in.csv", "", "{file}: the file is empty"),
        ("in.parquet", "x", "{file}: cannot be read"),
        ("in.txt", "x", "{file}: unknown format; allowed: .jsonl, .jsonl.gz, "),
        (None, "", "{file}: no such file"),
    ],
)
def test_bad_files(
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str | None,
    content: str,
    message: str,
) -> None:
    file = tmp_path / (name or "absent.csv")
    if name is not None:
        file.write_text(content)
    output = tmp_path / "out.jsonl"
    error = refused(capsys, adapter, "--input", file, "--output", output)
    assert error.startswith(f"error: {message.format(file=file)}")
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to predict; allowed: --text TEXT or --input FILE"),
        (["--text", "a", "--input", "x.csv"], "--text and --input are mutually exclusive"),
        (
            ["--text", "a", "--text", "b", "--text-pair", "c"],
            "--text-pair: given once, but --text 2 times; allowed: one for each",
        ),
        (["--text-pair", "c"], "nothing to predict"),
        (
            ["--text", "a", "--text", "b", "c"],
            'unexpected argument: "c"; hint: lorakit predict --h',
        ),
        (["surplus"], 'unexpected argument: "surplus"'),
        (
            ["--text", "a", "--output", "out.txt"],
            "--output out.txt: unknown format; allowed: .json",
        ),
        (["--text", "a", "--output", "no/out.csv"], "--output no/out.csv: directory no does not"),
        (
            ["--text", "a", "--text-column", "b"],
            "--text-column, --text-pair-column: require --input",
        ),
        (["--text", "a", "--batch-size", "0"], "invalid value for '--batch-size'"),
        (["--text", "a", "--max-length", "2"], "max_length = 2: allowed for this model: 3 to 256"),
        (["--text", "a", "--adapter", "absent"], "--adapter absent: no such adapter directory"),
    ],
)
def test_wrong_options(
    adapter: Path,
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert refused(capsys, adapter, *options).startswith(f"error: {message}")
    assert list(in_tmp.iterdir()) == []


def test_what_belongs_to_generate_and_what_to_predict(
    tiny_bert: Path,
    tiny_llama: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "hint: use lorakit generate" in refused(capsys, tiny_llama, "--text", "a")
    write_adapter(tiny_llama, tmp_path / "causal", "causal")
    causal = refused(capsys, tiny_llama, "--adapter", tmp_path / "causal", "--text", "a")
    assert "hint: use lorakit generate" in causal
    lorakit.merge(tiny_bert, adapter, tmp_path / "merged")
    capsys.readouterr()
    for arguments in ([tiny_bert, "--adapter", adapter], [adapter], [tmp_path / "merged"]):
        assert run(["generate", *map(str, arguments), "--prompt", "a"]) == 2
        assert "hint: use lorakit predict" in capsys.readouterr().err


def test_generate_accepts_the_adapter_alone(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tiny_llama, tmp_path / "adapter", "causal", scale=3.0)
    texts = []
    for arguments in ([tiny_llama, "--adapter", tmp_path / "adapter"], [tmp_path / "adapter"]):
        options = ["--prompt", "to be", "--max-new-tokens", "8"]
        assert run(["generate", *map(str, arguments), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
