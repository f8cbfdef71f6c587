"""``lorakit init``: what it writes trains without an edit; what it asks, and what it refuses."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import lorakit
from lorakit.cli.main import run
from tests.families import save_classifier
from tests.training.runs import WORDS

COUNT = 40
TEXTS = [" ".join(WORDS[i % 5 : i % 8 + 5]) for i in range(COUNT)]


def chat_rows() -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}
        for text in TEXTS
    ]


def sharegpt_rows() -> list[dict[str, Any]]:
    return [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "no"}]}
        for text in TEXTS
    ]


def columns(**given: Any) -> list[dict[str, Any]]:
    """Rows of columns, each of a value or a function of the row's number."""
    return [{n: v(i) if callable(v) else v for n, v in given.items()} for i in range(COUNT)]


def write(file: str, rows: list[dict[str, Any]]) -> None:
    path = Path(file)
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(
                handle, [*rows[0]], delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        text = f"[{', '.join(lines)}]" if path.suffix == ".json" else "\n".join(lines) + "\n"
        path.write_text(text)


def text(i: int) -> str:
    return TEXTS[i]


#: File -> rows, model, the task that is chosen.
FILES: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "chat.jsonl": (chat_rows(), "tiny_llama", "chat"),
    "sharegpt.json": (sharegpt_rows(), "tiny_llama", "chat"),
    "alpaca.json": (columns(instruction=text, input="", output="blue"), "tiny_llama", "chat"),
    "pairs.csv": (columns(prompt=text, completion=" red"), "tiny_llama", "completion"),
    "qa.csv": (columns(question=text, answer=lambda i: f"green {i}"), "tiny_llama", "completion"),
    "docs.jsonl": (columns(text=text), "tiny_llama", "text"),
    "reviews.tsv": (
        columns(id=lambda i: i, review=text, stars=lambda i: "good" if i % 2 else "bad"),
        "tiny_bert", "classification",
    ),
    "nli.parquet": (
        columns(premise=text, hypothesis=text, label=lambda i: i % 3), "tiny_bert", "classification",
    ),
    "topics.jsonl": (
        columns(text=text, labels=lambda i: ["a", "b"][: i % 3]), "tiny_bert", "classification",
    ),
    "names.jsonl": (
        columns(tokens=["one", "two"], tags=lambda i: ["O", "B-X" if i % 2 else "O"]),
        "tiny_bert", "token_classification",
    ),
    "upos.jsonl": (
        columns(words=["one", "two"], upos=lambda i: [3, i % 3]), "tiny_bert", "token_classification",
    ),
    "folder/train.csv": (columns(text=text, label=lambda i: "yn"[i % 2]), "tiny_bert", "classification"),
}  # fmt: skip


@pytest.fixture
def model(request: pytest.FixtureRequest, in_tmp: Path) -> Callable[[str], str]:
    return lambda name: str(request.getfixturevalue(name))


#: Kinds of files that differ little from others: a run of each would take too long.
SIMILAR = ("pairs.csv", "qa.csv", "sharegpt.json", "folder/train.csv")


@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=pytest.mark.slow if f in SIMILAR else ()) for f in FILES]
)
def test_init_then_train_without_an_edit(
    file: str, model: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows, name, task = FILES[file]
    write(file, rows)
    data = "folder" if file.startswith("folder") else file
    assert run(["init", "--model", model(name), "--data", data, "--hardware", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"recipe.yaml: {task}, lora, ")
    assert run(["validate", "recipe.yaml"]) == 0
    found = lorakit.train(lorakit.load_recipe("recipe.yaml", {"train.max_steps": 2}))
    assert found.metrics["loss"] > 0
    assert (found.adapter_dir / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["lora_plus", "adalora", "intrinsic", "full"])
def test_other_methods_train(method: str, model: Callable[[str], str]) -> None:
    write("rows.csv", FILES["folder/train.csv"][0])
    written = lorakit.init_recipe(
        model=model("tiny_bert"), data="rows.csv", method=method, hardware="cpu",
        overrides={"train.epochs": 1},
    )  # fmt: skip
    low, high = type(written.recipe.adapter).usual_learning_rates or (0, 0)
    assert low <= written.recipe.train.learning_rate <= high
    assert lorakit.train(written.recipe).metrics["loss"] > 0


def test_the_file_says_what_it_is(
    model: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    write("reviews.tsv", FILES["reviews.tsv"][0])
    given = ["--model", model("tiny_bert"), "--data", "reviews.tsv", "--hardware", "cpu"]
    assert run(["init", *given, "--output", "my first.yaml", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["recipe"], facts["task"], facts["rows"]) == (
        "my first.yaml",
        "classification",
        40,
    )
    assert facts["tokens"]["median"] <= facts["tokens"]["longest"]
    assert facts["is_estimate"] is False
    lines = Path("my first.yaml").read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=recipe.schema.json"
    assert lines[1] == "# reviews.tsv: 40 rows, texts in review, 2 classes in stars."
    assert "#   lorakit train 'my first.yaml'        # train the adapter" in lines
    assert max(map(len, lines)) <= 100
    recipe = lorakit.load_recipe("my first.yaml")
    assert recipe.task.validation_share == 0.1
    assert recipe.train.output_dir == "runs/my first"


def test_a_gpu_and_a_model_that_is_not_here(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("chat.jsonl", FILES["chat.jsonl"][0])
    given = ["--model", "some/Model-14B", "--data", "chat.jsonl", "--hardware", "gpu:24"]
    assert run(["init", *given]) == 0
    assert "some/Model-14B: not on this machine" in capsys.readouterr().err
    recipe = lorakit.load_recipe("recipe.yaml")
    assert (recipe.model.dtype, recipe.model.base_precision) == ("bfloat16", "nf4")
    assert (recipe.train.per_device_batch_size, recipe.train.gradient_checkpointing) == (
        "auto",
        True,
    )
    assert recipe.train.learning_rate == 2e-4
    comments = " ".join(Path("recipe.yaml").read_text().replace("#", "").split())
    assert "an estimate, as the tokenizer is not on this machine" in comments


def test_set_changes_keys_and_names_columns(model: Callable[[str], str]) -> None:
    write("rows.csv", columns(a=text, b=lambda i: f"{i % 2}"))
    written = lorakit.init_recipe(
        model=model("tiny_bert"), data="rows.csv", task="classification", hardware="cpu",
        overrides={"task.text_column": "a", "task.label_column": "b", "train.max_steps": 1, "train.seed": 3},
    )  # fmt: skip
    assert (written.recipe.task.text_column, written.recipe.train.seed) == ("a", 3)
    assert (written.recipe.train.epochs, written.recipe.train.max_steps) == (None, 1)
    assert lorakit.train(written.recipe).steps == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--data", "none.csv"], "none.csv: no such file or directory"),
        (["--data", "empty.csv"], "empty.csv: the file is empty"),
        (["--data", "other.csv"], "the columns 'a', 'b' fit no task"),
        (["--data", "bad.jsonl"], "bad.jsonl, row 2"),
        (["--data", "notes.txt"], "unknown format"),
        (["--data", "."], "no split 'train'"),
        (["--model", "./none"], "./none: no such directory"),
        (["--model", "rows.csv"], "rows.csv: a file"),
        (["--task", "clasification"], "--task clasification: unknown (did you mean 'classification'?)"),
        (["--task", "chat"], "do not fit --task chat, which needs messages or"),
        (["--task", "text"], "is not a causal language model"),
        (["--method", "lorra"], "--method lorra: unknown (did you mean 'lora'?)"),
        (["--hardware", "tpu"], "--hardware tpu: allowed: cpu, gpu"),
        (["--method", "bitfit", "--model", "LLAMA"], "--method bitfit: trains biases"),
        (["--set", "train.sed=1"], "--set: train.sed = 1: unknown key"),
        (["--set", "train"], "'train' has no '='"),
        (["--output", "."], "--output .: is a directory"),
        (["--output", "no/recipe.yaml"], "directory no does not exist"),
        (["--output", "rows.csv"], "--output rows.csv: already exists; hint: choose another"),
        (["--validation", "none.csv"], "none.csv: no such file or directory"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    changes: list[str], said: str, model: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    write("rows.csv", FILES["folder/train.csv"][0])
    write("other.csv", columns(a=text, b=text))
    Path("empty.csv").touch()
    Path("notes.txt").write_text("a\n")
    Path("bad.jsonl").write_text('{"text": "a", "label": 1}\n{"text":\n')
    before = sorted(path.name for path in Path().iterdir())
    given = ["--model", model("tiny_bert"), "--data", "rows.csv", "--hardware", "cpu"]
    changes = [model("tiny_llama") if word == "LLAMA" else word for word in changes]
    assert run(["init", *given, *changes]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert sorted(path.name for path in Path().iterdir()) == before


def test_without_a_terminal_the_missing_options_are_named(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["init"]) == 2
    assert (
        "error: missing --model and --data: required when stdin is not" in capsys.readouterr().err
    )
    assert run(["init", "--model", "m", "--task", "classification"]) == 2
    assert "error: missing --data: " in capsys.readouterr().err


def test_names_of_columns_cannot_end_a_comment_or_control_a_terminal(
    model: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = columns(**{"te\x1b[31mxt\u2028a: b": text, "a\nlabel #": lambda i: "xy"[i % 2]})
    write("rows.jsonl", rows)
    written = lorakit.init_recipe(model=model("tiny_bert"), data="rows.jsonl", hardware="cpu")
    assert written.recipe.task.label_column == "a\nlabel #"
    assert all(line.isprintable() for line in Path("recipe.yaml").read_text().split("\n"))
    given = ["--model", model("tiny_bert"), "--data", "rows.jsonl", "--hardware", "cpu"]
    capsys.readouterr()  # what the model's fixture printed
    assert run(["init", *given, "--overwrite"]) == 0
    shown = capsys.readouterr()
    assert [line for line in (shown.out + shown.err).split("\n") if not line.isprintable()] == []


def on_a_terminal(typed: str) -> tuple[int, str]:
    """Type at the first question of ``lorakit init`` on a terminal of its own; the exit code and
    output."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit", "init"],
        stdin=child, stdout=child, stderr=child, close_fds=True, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(child)
    shown = b""
    with suppress(OSError):  # the process has ended
        while not shown.endswith(b": "):
            shown += os.read(parent, 4096)
        os.write(parent, typed.encode())
        while data := os.read(parent, 4096):
            shown += data
    os.close(parent)
    return process.wait(), shown.decode().replace("\r\n", "\n")


def test_a_terminal_is_asked_and_enter_accepts(
    model: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("rows.csv", FILES["folder/train.csv"][0])
    answers = [model("tiny_bert"), "none.csv", "rows.csv", "chat", "", "adalora", "cpu"]
    parent, child = pty.openpty()
    os.write(parent, "".join(f"{answer}\n" for answer in answers).encode())
    with os.fdopen(child) as typed:
        monkeypatch.setattr(sys, "stdin", typed)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        code = run(["init"])
    os.close(parent)
    shown = capsys.readouterr().err
    assert code == 0, shown
    assert "error: none.csv: no such file or directory" in shown
    assert "rows.csv: 40 rows, columns text, label" in shown
    assert "error: --data rows.csv: the columns 'text', 'label' do not fit --task chat" in shown
    assert "[classification]: " in shown
    assert "[lora]: " in shown
    recipe = lorakit.load_recipe("recipe.yaml")
    assert (recipe.adapter.method, recipe.task.name) == ("adalora", "classification")


@pytest.mark.parametrize(
    ("typed", "code", "said"), [("\x03", 130, "interrupted"), ("\x04", 2, "no answer for model")]
)
def test_questions_can_be_stopped(typed: str, code: int, said: str, in_tmp: Path) -> None:
    found, shown = on_a_terminal(typed)
    assert (found, said in shown) == (code, True), shown
    assert not Path("recipe.yaml").exists()


def test_a_head_for_other_labels_is_replaced(tiny_bert: Path, in_tmp: Path) -> None:
    base = save_classifier(in_tmp / "classifier", tiny_bert, ["spam", "ham"])
    write("rows.csv", FILES["folder/train.csv"][0])
    written = lorakit.init_recipe(model=str(base), data="rows.csv", hardware="cpu")
    assert written.recipe.model.new_head is True
    lorakit.train(lorakit.load_recipe("recipe.yaml", {"train.max_steps": 1}))


def test_a_model_without_a_chat_template_gets_one(tiny_llama: Path, in_tmp: Path) -> None:
    shutil.copytree(tiny_llama, "base")
    Path("base/chat_template.jinja").unlink()
    write("chat.jsonl", FILES["chat.jsonl"][0])
    written = lorakit.init_recipe(model="./base", data="chat.jsonl", hardware="cpu")
    assert written.recipe.model.chat_template == "vicuna"
    lorakit.train(lorakit.load_recipe("recipe.yaml", {"train.max_steps": 1}))


def test_a_task_of_a_file_and_one_with_data_of_its_own(tiny_bert: Path, in_tmp: Path) -> None:
    Path("own.py").write_text(
        "from lorakit.tasks.classification import Classification\n\n\nclass Own(Classification): ...\n"
    )
    write("rows.csv", FILES["folder/train.csv"][0])
    given = ["--model", str(tiny_bert), "--hardware", "cpu"]
    assert run(["init", *given, "--data", "rows.csv", "--task", "./own.py:Own"]) == 0
    assert lorakit.load_recipe("recipe.yaml").task.name == "./own.py:Own"
    assert run(["init", *given, "--task", "glue/sst2", "-o", "sst2.yaml"]) == 0
    recipe = lorakit.load_recipe("sst2.yaml")
    assert (recipe.task.path, recipe.train.output_dir) == (None, "runs/sst2")
