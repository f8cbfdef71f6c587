"""``model.add_tokens`` and ``model.chat_template`` in a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.cli.main import run

RECIPE = """\
model:
  name_or_path: m
  {line}
adapter: {{r: 4, target_modules: [q]}}
task: {{name: {task}, path: data}}
train: {{output_dir: run}}
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("add_tokens: ['<a>', ' ']", 'recipe.yaml, line 3: model.add_tokens[1] = " ": only whitespace'),
        ("add_tokens: ['<a>', '<b>', '<a>']", 'model.add_tokens[2] = "<a>": listed twice'),
        ("add_tokens: ['']", 'recipe.yaml, line 3: model.add_tokens[0] = ""'),
        ("add_tokens: [1]", "recipe.yaml, line 3: model.add_tokens[0] = 1"),
        ("add_tokens: {a: b}", "recipe.yaml, line 3: model.add_tokens"),
        ("add_tokens: null", "recipe.yaml, line 3: model.add_tokens"),
        ("chat_template: chat-ml", "no such template or file (did you mean 'chatml'?); allowed"),
        ("chat_template: data", 'model.chat_template = "data": no such template or file'),
        ("chat_template: broken.jinja", "recipe.yaml, line 3: model.chat_template = \"broken.jinja\": line 2"),
        ("chat_template: bytes.jinja", 'model.chat_template = "bytes.jinja": cannot be read'),
        ("chat_template: empty.jinja", 'model.chat_template = "empty.jinja": an empty file'),
        ("chat_template: ''", 'recipe.yaml, line 3: model.chat_template = "": '),
        (f"chat_template: {'x' * 5000}", "model.chat_template"),
    ],
)  # fmt: skip
def test_the_error_names_the_line(
    line: str, said: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_tmp / "data").mkdir()
    (in_tmp / "broken.jinja").write_text("{{ messages }}\n{% if ' %}")
    (in_tmp / "bytes.jinja").write_bytes(b"\xff\xfe")
    (in_tmp / "empty.jinja").write_text(" \n")
    (in_tmp / "recipe.yaml").write_text(RECIPE.format(line=line, task="chat"))
    assert run(["validate", "recipe.yaml"]) == 2
    assert said in capsys.readouterr().err


def test_a_classifier_has_no_chats(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = RECIPE.format(line="chat_template: chatml", task="classification")
    (in_tmp / "recipe.yaml").write_text(text)
    assert run(["validate", "recipe.yaml"]) == 2
    assert "model.chat_template = \"chatml\": the task has no chats; allowed: null" in capsys.readouterr().err  # fmt: skip


@pytest.mark.parametrize("line", ["add_tokens: <a>", "add_tokens: []", "chat_template: null"])
def test_valid(line: str, in_tmp: Path) -> None:
    (in_tmp / "data").mkdir()
    (in_tmp / "data" / "train.jsonl").write_text('{"messages": []}\n')
    (in_tmp / "recipe.yaml").write_text(RECIPE.format(line=line, task="chat"))
    assert run(["validate", "recipe.yaml"]) == 0
