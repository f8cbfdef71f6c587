"""Keys and columns that change what is trained: applied, refused, or reported once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli.main import run
from tests.tasks.wikisql_files import write_lines

Row = dict[str, Any]

RECIPE = """\
model: {{name_or_path: {model}, dtype: float32}}
adapter: {{r: 2, target_modules: [q, v]}}
task: {{name: {task}, path: data, max_length: 1000}}
train: {{output_dir: run, max_steps: 1, per_device_batch_size: 2}}
"""
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</s>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASK, WRONG = {"role": "user", "content": "3*3?"}, {"role": "assistant", "content": "It is 6."}
AGAIN, RIGHT = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "It is 9."}
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "tide", "arguments": '{"port": "B"}'}}


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model whose template renders tools, tool calls and reasoning, with a large window."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1000}))
    return folder


def prepared(model: Path, *rows: Row, task: str = "chat") -> str:
    Path("data").mkdir(exist_ok=True)
    for split in ("train", "validation"):
        write_lines(Path("data") / f"{split}.jsonl", rows)
    Path("recipe.yaml").write_text(RECIPE.format(model=model, task=task))
    return "recipe.yaml"


def command(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    found = run(list(arguments))
    out, err = capsys.readouterr()
    assert found == code, err
    assert "Traceback" not in err
    return out, err


def previewed(capsys: pytest.CaptureFixture[str], recipe: str) -> list[str]:
    """Return each row's text with the trained part in brackets."""
    out, _ = command(capsys, "preview", recipe, "--json")
    texts = []
    for row in json.loads(out)["examples"]:
        text, inside = "", False
        assert len(row["trained"]) == len(row["tokens"])
        for token, flag in zip(row["tokens"], row["trained"], strict=True):
            text += ("[" if flag else "]") * (flag != inside) + token.replace("Ġ", " ")
            inside = flag
        texts.append(text + "]" * inside)
    return texts


def test_turns_that_are_not_trained(
    model: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [ASK, {**WRONG, **off}, AGAIN, {**RIGHT, **on}]}
        for off, on in [({"train": False}, {"train": True}), ({"weight": 0}, {"weight": 1})]
    ]
    expected = "<user>3*3?</s><assistant>It is 6.</s><user>Sure?</s><assistant>[It is 9.</s>]"
    assert previewed(capsys, prepared(model, *rows)) == [expected, expected]


def test_a_system_column(model: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"system": "One word.", "messages": [ASK, RIGHT]}
    (text,) = previewed(capsys, prepared(model, row))
    assert text == "<system>One word.</s><user>3*3?</s><assistant>[It is 9.</s>]"


def test_history(model: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"instruction": "A darker one?", "input": "", "output": "navy", "system": "One word."}
    recipe = prepared(model, {**row, "history": [["Name a colour", "blue"]]})
    (text,) = previewed(capsys, recipe)
    assert text == (
        "<system>One word.</s><user>Name a colour</s><assistant>[blue</s>]"
        "<user>A darker one?</s><assistant>[navy</s>]"
    )
    _, err = command(capsys, "preview", recipe)
    assert "answers in the column history are trained too" in err
    for name in ("completion", "auto"):
        _, err = command(capsys, "train", recipe, "--set", f"task.name={name}", code=2)
        assert "error: data/train.jsonl, row 1: column 'history' = [[" in err
        assert "task.name: chat" in err
    assert not Path("run").exists()


def test_tools_and_their_calls(
    model: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "c", "name": "tide", "content": "low"}
    row = {"tools": [TOOL], "messages": [ASK, calling, result, RIGHT]}
    texts = previewed(capsys, prepared(model, row, {**row, "tools": json.dumps([TOOL])}))
    assert texts[0] == texts[1]
    tools, _, rest = texts[0].partition("</s>")
    assert json.loads(tools.removeprefix("<tools>")) == [TOOL]
    assert rest == (
        '<user>3*3?</s><assistant>[tide{"port": "B"}</s>]<tool>low</s><assistant>[It is 9.</s>]'
    )


@pytest.mark.parametrize(
    "form",
    [
        "{{ c.function.arguments | tojson }}",
        "{{ c.function.arguments }}",
        "{{ c.function.name[:0] + c.function.arguments }}",
        "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
        "{{ c.function.arguments | tojson }}{% endif %}",
    ],
)
@pytest.mark.parametrize("arguments", ['{"port": "B"}', {"port": "B"}])
def test_arguments_are_json_in_every_style_of_template(
    form: str, arguments: Any, model: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = TEMPLATE.replace("{{ c.function.arguments | tojson }}", form)
    assert form in template
    (model / "chat_template.jinja").write_text(template)
    call = {"type": "function", "function": {"name": "tide", "arguments": arguments}}
    turns = [ASK, {"role": "assistant", "tool_calls": [call], "train": False}, AGAIN, RIGHT]
    (text,) = previewed(capsys, prepared(model, {"messages": turns}))
    assert '<assistant>tide{"port": "B"}</s>' in text


def test_reasoning(model: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"messages": [ASK, {**RIGHT, "reasoning_content": "3+3+3"}]}
    recipe = prepared(model, row)
    (text,) = previewed(capsys, recipe)
    assert text.endswith("It is 9.</s>]")
    assert "<assistant>" in text
    assert "(3+3+3)" in text
    generate = ("--set", "task.eval_generate=end", "--set", "task.max_new_tokens=2")
    _, err = command(capsys, "train", recipe, *generate, code=2)
    said = "error: data/validation.jsonl, row 1: message 2: the last trained message has reasoning"
    assert said in err
    assert not Path("run").exists()
    Path("predictions.jsonl").write_text('{"prediction": "It is 9."}\n')
    _, err = command(capsys, "eval", recipe, "--predictions", "predictions.jsonl", code=2)
    assert said in err


ODD_CALL = {**CALL, "index": 0}
ODD = [
    {"messages": [ASK, {**WRONG, "tool_calls": [ODD_CALL], "train": False}, AGAIN, RIGHT], "id": 7},
    {"messages": [ASK, RIGHT], "id": 8, "chosen": None},
]
LISTED = "column id (2), messages[].tool_calls[].index (1)"


def unused(err: str) -> list[str]:
    return [line for line in err.splitlines() if "values that the task does not use" in line]


def test_unused_keys_are_named_once(
    model: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = prepared(model, *ODD)
    for arguments, splits in [
        (["preview", recipe], ["train"]),
        (["train", recipe], ["train", "validation"]),
        (["eval", recipe], ["validation"]),
        (["eval", recipe, "--base", "--split", "train"], ["train"]),
    ]:
        out, err = command(capsys, *arguments)
        assert "values that the task does not use" not in out
        assert unused(err) == [
            f"{split}: 2 of 2 rows have values that the task does not use: {LISTED}"
            for split in splits
        ]


def test_a_key_of_messages_that_the_template_does_not_read(
    model: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = prepared(model, {"messages": [{**ASK, "mood": "sure"}, RIGHT]})
    for arguments, splits in [
        (["preview", recipe], ["train"]),
        (["train", recipe], ["train", "validation"]),
        (["eval", recipe], ["validation"]),
    ]:
        _, err = command(capsys, *arguments)
        said = [line for line in err.splitlines() if "mood" in line]
        assert [line.partition(": ")[0] for line in said] == splits
        assert all("ignores" in line for line in said)
    (model / "chat_template.jinja").write_text(
        TEMPLATE.replace("{{ m.role }}", "{{ m.role }}{% if m.mood %} {{ m.mood }}{% endif %}")
    )
    _, err = command(capsys, "preview", recipe)
    assert "mood" not in err
    (text,) = previewed(capsys, recipe)
    assert text == "<user sure>3*3?</s><assistant>[It is 9.</s>]"


def test_unused_keys_of_a_stream_are_named(
    model: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {"messages": [ASK, RIGHT], "id": 1}
    recipe = prepared(model, *[plain] * 210, {**plain, "messages": ODD[0]["messages"]})
    Path("data/validation.jsonl").unlink()
    streaming = ("--set", "task.streaming=true", "--set", "task.shuffle_buffer_rows=300")
    _, err = command(capsys, "train", recipe, *streaming, "--set", "train.max_steps=160")
    assert unused(err) == [
        "train: 200 of the first 200 rows have values that the task does not use: column id (200)",
        "train: further rows have values that the task does not use: messages[].tool_calls[].index",
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"messages": [ASK, {**RIGHT, "weight": -0.5}]},
            "message 2: weight = -0.5; allowed: 0, or a number from 1e-06 to 1,000,000",
        ),
        ({"messages": [{**ASK, "train": True}, RIGHT]}, "message 1: train = true with role user"),
        ({"messages": [ASK, {**RIGHT, "loss": False}]}, "exclude every assistant message"),
        ({"messages": [ASK, RIGHT], "tools": "tide"}, "column 'tools' = \"tide\"; allowed: "),
        (
            {"messages": [ASK, RIGHT], "system": ["a"]},
            "column 'system' = [\"a\"]; allowed: text",
        ),
    ],
)
def test_what_is_refused_names_file_and_row(
    row: Row, said: str, model: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = prepared(model, {"messages": [ASK, RIGHT]}, row)
    for arguments in (["preview", recipe], ["train", recipe], ["eval", recipe, "--base"]):
        out, err = command(capsys, *arguments, code=2)
        split = "validation" if "eval" in arguments else "train"
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert errors[0].startswith(f"error: data/{split}.jsonl, row 2: ")
        assert said in errors[0]
        assert out == ""
    assert not Path("run").exists()
