from __future__ import annotations

import json
import os
import pty
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli.main import run
from tests.tasks.wikisql_files import write_lines

RECIPE = """\
model: {{name_or_path: {model}, dtype: float32}}
adapter: {{r: 2, target_modules: [q, v]}}
task: {{name: {task}, path: data, max_length: {length}}}
train: {{output_dir: run}}
"""
ROWS = [
    {"prompt": "line\n日本", "completion": "🚀 up"},
    {"prompt": "0123456789" * 3, "completion": "kept"},
    {"prompt": "long", "completion": "0123456789" * 4},
]


def recipe(model: Path, task: str = "completion", length: int = 24) -> str:
    Path("recipe.yaml").write_text(RECIPE.format(model=model, task=task, length=length))
    return "recipe.yaml"


@pytest.fixture
def completion(tiny_llama: Path, in_tmp: Path) -> str:
    Path("data").mkdir()
    write_lines(in_tmp / "data" / "train.jsonl", ROWS)
    return recipe(tiny_llama)


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    code = run(["preview", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    return json.loads(shown(capsys, *arguments, "--json")[0])


def test_rows_and_statistics(completion: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = shown(capsys, completion)
    assert (
        out
        == """\
completion, train: 3 of 3 rows; ⏎ is a line break; the loss is computed on text in ⟦ ⟧

--- data/train.jsonl, row 1: 19 tokens, 8 trained
line⏎
日本⟦🚀 up</s>⟧

--- data/train.jsonl, row 2: 24 tokens, 5 trained; truncated
1234567890123456789⟦kept</s>⟧

--- data/train.jsonl, row 3: 24 tokens, 23 trained; truncated, without its end and EOS
0⟦12345678901234567890123⟧

rows                   3
tokens                 67
tokens per row         19 to 24, 22.3 on average
trained tokens         36 (53.7%)
truncated rows         2 (to 24 tokens; 32 tokens lost)
truncated completions  1
"""
    )
    assert "data/train.jsonl: recognized as prompt and completion" in err
    assert "using '</s>' (EOS is unchanged)" in err
    assert "warning: train: 1 of 3 rows do not end in a trained EOS" in err


def test_json(completion: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, completion, "--start", 2, "--count", 1)
    (row,) = found["examples"]
    assert row["row"] == "data/train.jsonl, row 2"
    assert row["text"] == "1234567890123456789kept</s>"
    assert row["tokens"] == [*"1234567890123456789kept", "</s>"]
    assert row["trained"] == [False] * 19 + [True] * 5
    assert len(row["ids"]) == 24
    assert (row["truncated"], row["cut"], row["label"]) == (True, False, None)
    assert found["summary"] == {
        "rows": 3, "tokens": 67, "min_length": 19, "mean_length": 67 / 3, "max_length": 24,
        "truncated_rows": 2, "lost_tokens": 32, "trained_tokens": 36, "trained_share": 36 / 67,
        "cut_completions": 1, "rows_without_eos": 1, "bins": None, "bin_fill": None,
    }  # fmt: skip
    packed = as_json(capsys, completion, "--set", "task.packing=true")["summary"]
    assert (packed["bins"], packed["bin_fill"]) == (3, 67 / (3 * 24))
    limited = as_json(capsys, completion, "--limit", 1, "--count", 0)
    assert (limited["examples"], limited["summary"]["rows"]) == ([], 1)


def test_control_characters_are_escaped(
    tiny_llama: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;title\x07\x9b31m\r\x08\u202e\u2028[red]x[/red] :smile: \u27e6\t"
    Path("data").mkdir()
    write_lines(in_tmp / "data" / "train.jsonl", [{"prompt": evil, "completion": evil + "."}])
    out, _ = shown(capsys, recipe(tiny_llama, length=200))
    told = r"\x1b]0;title\x07\x9b31m\r\x08\u202e\u2028[red]x[/red] :smile: \u27e6\t"  # each as it is written in Python
    assert f"\n{told}⟦{told}.</s>⟧\n" in out
    assert not set(out) & set("\x1b\x07\x9b\r\x08\u202e\u2028\t")
    assert as_json(capsys, "recipe.yaml")["examples"][0]["text"] == f"{evil}{evil}.</s>"


def in_terminal(monkeypatch: pytest.MonkeyPatch, *arguments: str, **extra: str) -> str:
    """Return the output of a run on a terminal of 40 columns."""
    ours, theirs = pty.openpty()
    with monkeypatch.context() as patch, os.fdopen(theirs, "w", encoding="utf-8") as stdout:
        patch.delenv("NO_COLOR", raising=False)
        for name, value in {"TERM": "xterm-256color", "COLUMNS": "40", **extra}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", stdout)
        assert run(["preview", *arguments]) == 0
    parts = []
    with suppress(OSError), os.fdopen(ours, "rb", buffering=0) as read:  # Linux ends with an error
        while part := read.read(1 << 16):
            parts.append(part)
    return b"".join(parts).decode().replace("\r\n", "\n")


def test_colors_on_a_terminal(completion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ("--start", "2", "--count", "1")
    out = in_terminal(monkeypatch, completion, *row)
    assert "\x1b[2m1234567890123456789\x1b[0m\x1b[32mkept\x1b[0m\x1b[1;32m</s>\x1b[0m\n" in out
    assert "\x1b[32mtrained\x1b[0m" in out
    assert "⟦" not in out
    for plain in (
        in_terminal(monkeypatch, completion, *row, "--plain"),
        in_terminal(monkeypatch, completion, *row, NO_COLOR="1"),
        in_terminal(monkeypatch, completion, *row, TERM="dumb"),
    ):
        assert "\x1b" not in plain
        assert "1234567890123456789⟦kept</s>⟧\n" in plain


def test_classification(tiny_bert: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The labels are those of the training split, whichever split is shown."""
    Path("data").mkdir()
    train = [{"text": "a", "label": name} for name in ("sour", "bitter", "sweet")]
    write_lines(in_tmp / "data" / "train.jsonl", train)
    held_out = [{"text": "far too long for ten", "label": "sweet"}]
    write_lines(in_tmp / "data" / "validation.jsonl", held_out)
    out, err = shown(capsys, recipe(tiny_bert, "classification", 10), "--split", "validation")
    assert "classification, validation: 1 of 1 row; " in out
    assert "the loss is computed on the label\n" in out
    assert "10 tokens; truncated\n[CLS]far too [SEP]\nlabel: sweet\n" in out
    assert "truncated rows         1 (to 10 tokens; 12 tokens lost)" in out
    assert "trained tokens" not in out
    assert err == ""
    found = as_json(capsys, "recipe.yaml")
    assert found["labels"] == ["bitter", "sour", "sweet"]
    assert found["label_counts"] == {"bitter": 1, "sour": 1, "sweet": 1}
    assert [row["label"] for row in found["examples"]] == ["sour", "bitter", "sweet"]
    assert found["summary"]["trained_tokens"] is None


def test_several_labels_and_tags_of_words(
    tiny_bert: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data").mkdir()
    rows: list[dict[str, Any]] = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}]
    write_lines(in_tmp / "data" / "train.jsonl", rows)
    several = ("--set", "task.multi_label=true")
    out, err = shown(capsys, recipe(tiny_bert, "classification", 10), *several)
    assert "[CLS]a[SEP]\nlabels: x, y\n" in out
    assert "[CLS]b[SEP]\nlabels: none\n" in out
    assert "labels                 x 1, y 1\n" in out
    assert [row["label"] for row in as_json(capsys, "recipe.yaml", *several)["examples"]] == [
        ["x", "y"],
        [],
    ]
    rows = [{"tokens": ["Ann", "of", "Rome"], "tags": ["B-PER", "O", "B-LOC"]}]
    write_lines(in_tmp / "data" / "train.jsonl", rows)
    out, err = shown(capsys, recipe(tiny_bert, "token_classification", 20))
    assert "the loss is computed on the label of each word, at its first token, in ⟦ ⟧\n" in out
    assert "[CLS]⟦A⟧nn ⟦o⟧f ⟦R⟧ome[SEP]\nlabels: B-PER, O, B-LOC\n" in out
    assert "labels                 O 1, B-LOC 1, B-PER 1\n" in out
    assert err == ""


def test_the_default_length_is_the_same_as_in_training(
    tiny_bert: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data").mkdir()
    rows = [{"text": "x" * 300, "label": name} for name in ("sour", "sweet")]
    write_lines(in_tmp / "data" / "train.jsonl", rows)
    file = Path(recipe(tiny_bert, "classification", 512))
    file.write_text(file.read_text().replace(", max_length: 512", ""))
    out, err = shown(capsys, file)
    assert "truncated rows         2 (to 256 tokens; 92 tokens lost)" in out
    assert "task.max_length: 256 instead of the default 512" in err


def test_chat_of_a_real_model(
    smollm2: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data").mkdir()
    turns = [("user", "Wie heißt Tōkyō?"), ("assistant", "東京 🗼")]
    messages = [{"role": role, "content": content} for role, content in turns]
    write_lines(in_tmp / "data" / "train.jsonl", [{"messages": messages}])
    out, err = shown(capsys, recipe(smollm2, "chat", 100))
    assert "<|im_start|>assistant⏎\n⟦東京 🗼<|im_end|>⟧⏎\n" in out
    assert "warning" not in err


def test_a_chat_template_without_eos_is_reported(
    tiny_llama: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = in_tmp / "model"
    shutil.copytree(tiny_llama, model)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    Path("data").mkdir()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_lines(in_tmp / "data" / "train.jsonl", [{"messages": messages}] * 2)
    out, err = shown(capsys, recipe(model, "chat", 100))
    assert "<user>a⟦<assistant>b⟧\n" in out
    assert "warning: train: 2 of 2 rows do not end in a trained EOS" in err
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, ord("b") - 31]}))
    assert as_json(capsys, "recipe.yaml")["examples"][0]["ids"][-1] == ord("b") - 31
    assert "warning" not in shown(capsys, "recipe.yaml")[1]


def test_weights_are_not_needed(
    completion: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_llama, "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(Path("bare").glob("*.safetensors"))
    assert shown(capsys, completion, "--set", "model.name_or_path=bare")[0].startswith("completion")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", "4"], "error: --start 4: data/train.jsonl has 3 rows; allowed: 1 to 3"),
        (["--start", "3", "--limit", "2"], "has 2 rows with --limit 2; allowed: 1 to 2"),
        (["--split", "test"], "recipe.yaml, line 3: task.path = \"data\": no split 'test'"),
        (["--set", "task.max_length=1"], "row 1: nothing to train on within task.max_length = 1"),
        (["--set", "model.name_or_path=./gone"], 'error: --set: model.name_or_path = "./gone": '),
        (
            ["--set", "task.name=text"],
            'task.format = "auto": data/train.jsonl, row 1: unknown format',
        ),
        (["--set", "task.nmae=text"], "task.nmae"),
        (["--count", "-1"], "--count"),
    ],
)
def test_invalid_input_is_one_line(
    arguments: list[str], message: str, completion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["preview", completion, *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""
