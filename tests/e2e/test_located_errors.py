"""Errors that a recipe key causes after loading name the recipe's file and line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lorakit.cli.main import run
from tests.tasks.wikisql_files import write_lines

RECIPE = """\
model:
  name_or_path: MODEL
  dtype: float32
adapter:
  method: lora
  target_modules: [q, v]
task:
  name: completion
  path: data
  max_length: 24
train:
  output_dir: run
  max_steps: 2
"""


@pytest.fixture
def recipe(tiny_llama: Path, in_tmp: Path) -> str:
    Path("data").mkdir()
    Path("empty").mkdir()
    rows = [{"prompt": "a" * n, "completion": "b"} for n in range(1, 5)]
    for split in ("train", "validation"):
        write_lines(in_tmp / "data" / f"{split}.jsonl", rows)
    Path("recipe.yaml").write_text(RECIPE.replace("MODEL", str(tiny_llama)))
    return "recipe.yaml"


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def edit(recipe: str, old: str, new: str) -> None:
    text = Path(recipe).read_text()
    assert old in text
    Path(recipe).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        (
            "[q, v]",
            "[q, no_such_module]",
            'recipe.yaml, line 6: adapter.target_modules = ["q", "no_such_module"]: ',
        ),
        ("max_steps: 2", "warmup_steps: 99", "recipe.yaml, line 13: train.warmup_steps = 99: "),
        ("path: data", "path: gone", 'recipe.yaml, line 9: task.path = "gone": no such file'),
        ("path: data", "path: empty", 'recipe.yaml, line 9: task.path = "empty": no split '),
        ("lora\n", "lora\n  layers: [77]\n", "recipe.yaml, line 6: adapter.layers = [77]: "),
        (
            "lora\n",
            "lora\n  modules_to_save: [x]\n",
            'recipe.yaml, line 6: adapter.modules_to_save = ["x"]: ',
        ),
        (
            "lora\n",
            "lora\n  rank_pattern: {k: 4}\n",
            'recipe.yaml, line 6: adapter.rank_pattern = {"k": 4}: ',
        ),
        (
            "path: data\n",
            "path: data\n  prompt_column: q\n",
            'recipe.yaml, line 10: task.prompt_column = "q": data/train.jsonl: no column ',
        ),
        (
            "path: data\n",
            "path: data\n  completion_template: '{a}'\n",
            'recipe.yaml, line 10: task.completion_template = "{a}": data/train.jsonl: no column ',
        ),
        (
            "path: data\n",
            "path: data\n  format: alpaca\n",
            'recipe.yaml, line 10: task.format = "alpaca": data/train.jsonl: no column',
        ),
        (
            "name: completion\n",
            "name: text\n",
            'recipe.yaml, line 7: task.format = "auto": data/train.jsonl, row 1: unknown format',
        ),
    ],
)
def test_train(
    recipe: str, capsys: pytest.CaptureFixture[str], old: str, new: str, place: str
) -> None:
    edit(recipe, old, new)
    assert error(capsys, "train", recipe).startswith(f"error: {place}")
    assert error(capsys, "train", recipe, "--dry-run").startswith(f"error: {place}")
    assert not Path("run").exists()


@pytest.mark.parametrize("arguments", [["train"], ["eval", "--base"], ["preview"]])
def test_model(recipe: str, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    command, *options = arguments
    place = 'model.name_or_path = "./gone": no such directory; allowed: '
    override = ["--set", "model.name_or_path=./gone"]
    assert error(capsys, command, recipe, *options, *override).startswith(f"error: --set: {place}")
    edit(recipe, Path(recipe).read_text().splitlines()[1].strip(), "name_or_path: ./gone")
    said = error(capsys, command, recipe, *options)
    assert said.startswith(f"error: recipe.yaml, line 2: {place}")


@pytest.mark.parametrize("arguments", [["train"], ["eval", "--base"], ["preview"]])
def test_a_tokenizer_without_an_eos_token(
    recipe: str,
    tiny_llama: Path,
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    shutil.copytree(tiny_llama, in_tmp / "model")
    file = in_tmp / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"eos_token": None, "pad_token": "<unk>"}
    file.write_text(json.dumps(settings))
    edit(recipe, str(tiny_llama), "./model")
    command, *options = arguments
    said = error(capsys, command, recipe, *options)
    place = 'recipe.yaml, line 2: model.name_or_path = "./model": the tokenizer has no EOS token'
    assert said.startswith(f"error: {place}")


@pytest.mark.parametrize("arguments", [["train"], ["eval", "--base"], ["preview"]])
def test_a_default_is_placed_at_its_section(
    recipe: str, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    edit(recipe, "  path: data\n", "")
    command, *options = arguments
    said = error(capsys, command, recipe, *options)
    assert said.startswith("error: recipe.yaml, line 7: task.path = null: ")


def test_an_error_about_a_data_file_names_that_file(
    recipe: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_tmp / "data" / "train.jsonl").write_text("{\n")
    edit(recipe, "path: data", "path: data/train.jsonl")
    assert error(capsys, "train", recipe).startswith("error: data/train.jsonl")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "./gone", "--prompt", "a"],
        ["generate", "BERT", "--prompt", "a"],
        ["merge", "./gone", "adapter", "out"],
    ],
)
def test_without_a_recipe_no_key_is_named(
    tiny_bert: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    said = error(capsys, *(str(tiny_bert) if part == "BERT" else part for part in arguments))
    assert "name_or_path" not in said
    assert "recipe" not in said
