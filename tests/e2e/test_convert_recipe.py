from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.cli import main as cli

THEIRS = """\
base_model: org/base
adapter: lora
lora_target_linear: true
datasets: [{path: rows.jsonl, type: alpaca}]
learning_rate: 1e-4
evals_per_epoch: 4
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("theirs.yml").write_text(THEIRS)
    Path("rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    return Path("theirs.yml")


def test_the_recipe_goes_to_stdout_and_notes_to_stderr(
    theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["convert-recipe", "theirs.yml"]) == 0
    shown = capsys.readouterr()
    Path("recipe.yaml").write_text(shown.out)
    assert cli.run(["validate", "recipe.yaml"]) == 0
    assert "no counterpart: evals_per_epoch: 4: see train.eval_every_steps" in shown.err


def test_output(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert-recipe", "theirs.yml", "--output", "recipe.yaml"]) == 0
    assert capsys.readouterr().out == ""
    assert cli.run(["validate", "recipe.yaml"]) == 0
    before = Path("recipe.yaml").read_bytes()
    assert cli.run(["convert-recipe", "theirs.yml", "--output", "recipe.yaml"]) == 2
    assert "--output recipe.yaml: already exists; hint: choose another" in capsys.readouterr().err
    assert Path("recipe.yaml").read_bytes() == before
    assert cli.run(["convert-recipe", "theirs.yml", "--output", "recipe.yaml", "--overwrite"]) == 0
    assert cli.run(["convert-recipe", "theirs.yml", "--output", "two\nlines"]) == 2
    assert '--output "two\\nlines": contains a control character' in capsys.readouterr().err


def test_json(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert-recipe", "theirs.yml", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["tool"], found["recipe"]["model"]["name_or_path"]) == ("Axolotl", "org/base")
    assert shown.err == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "theirs.yml: the file is empty; allowed: a mapping of keys to values"),
        ("a: 1\n", "theirs.yml: the keys are neither Axolotl's"),
        ("model: {}\ntrain: {}\n", "theirs.yml: already a recipe of lorakit"),
        ("base_model: [m\n", "theirs.yml, line 2: not valid YAML"),
        ("base_model: m\nrl: dpo\n", 'theirs.yml: rl = "dpo": lorakit trains on examples'),
    ],
)
def test_errors_are_one_line(
    text: str, message: str, theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs.write_text(text)
    assert cli.run(["convert-recipe", "theirs.yml", "--output", "recipe.yaml"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {message}")
    assert len(shown.err.splitlines()) == 1
    assert not Path("recipe.yaml").exists()


def test_the_file_itself_is_not_replaced(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert-recipe", "theirs.yml", "--output", "theirs.yml", "--overwrite"]) == 2
    assert "is the file to convert" in capsys.readouterr().err
