"""full, bitfit and intrinsic from the command line: train, resume, evaluate, generate, merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from lorakit.cli.main import run
from tests.training.runs import (
    adapter_bytes,
    log_lines,
    run_json,
    tree,
    without_dropout,
    write_recipe_file,
)

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "full-top": {"method": "full", "target_modules": ["q", "v"], "layers": [1]},
    "bitfit": {"method": "bitfit"},
    "intrinsic": {"method": "intrinsic", "d": 64},
}
#: bitfit needs a model with biases.
TASKS = {name: "glue/sst2" if name == "bitfit" else "completion" for name in METHODS}
CHANGES: dict[str, Any] = {
    "task__limit_train": 16,
    "task__limit_eval": 6,
    "train__epochs": None,
    "train__max_steps": 4,
    "train__learning_rate": 2e-3,
    "train__save_every_steps": 2,
    "train__save_total_limit": None,
    "train__eval_every_steps": 2,
}


@pytest.fixture
def recipe(name: str, tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> Path:
    return recipe_of(name, tiny_llama, tiny_bert, tmp_path)


def recipe_of(name: str, llama: Path, bert: Path, folder: Path, **changes: Any) -> Path:
    model = llama if TASKS[name] == "completion" else without_dropout(bert, folder)
    file = write_recipe_file(folder, model, TASKS[name], **CHANGES, **changes)
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"adapter": METHODS[name]}))
    return file


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, float]:
    capsys.readouterr()
    assert run(["eval", *map(str, arguments), "--json"]) == 0
    metrics: dict[str, float] = json.loads(capsys.readouterr().out)["metrics"]
    return metrics


@pytest.mark.parametrize("name", METHODS)
def test_train_resume_eval_merge(
    name: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "run"
    assert run(["train", str(recipe)]) == 0
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "PEFT cannot load" in line]
    assert f"lorakit merge {json.loads(recipe.read_text())['model']['name_or_path']}" in line
    losses = [line["loss"] for line in log_lines(whole)]
    assert losses[-1] < losses[0]

    middle = str(whole / "checkpoints" / "step-2")
    again = tmp_path / "again"
    assert run(["train", str(recipe), "--output-dir", str(again), "--resume", middle]) == 0
    assert adapter_bytes(again) == adapter_bytes(whole)
    assert run_json(again)["metrics"] == run_json(whole)["metrics"]

    metrics = run_json(whole)["metrics"]
    with_adapter = evaluated(capsys, recipe)
    assert with_adapter == pytest.approx(metrics, rel=1e-5)
    base = json.loads(recipe.read_text())["model"]["name_or_path"]
    assert run(["merge", base, str(whole / "adapter"), str(tmp_path / "merged")]) == 0
    merged = f"model.name_or_path={tmp_path / 'merged'}"
    assert evaluated(capsys, recipe, "--base", "--set", merged) == pytest.approx(
        with_adapter, rel=1e-5
    )
    if TASKS[name] == "completion":
        untrained = evaluated(capsys, recipe, "--base")
        assert abs(untrained["loss"] - with_adapter["loss"]) > 1e-4, "the training does something"


@pytest.mark.parametrize("name", ["full", "intrinsic"])
def test_generate_with_the_adapter_and_merged_alike(
    name: str, recipe: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", str(recipe)]) == 0
    adapter = str(tmp_path / "run" / "adapter")
    assert run(["merge", str(tiny_llama), adapter, str(tmp_path / "merged")]) == 0
    texts = []
    for model, options in ((tiny_llama, ["--adapter", adapter]), (tmp_path / "merged", [])):
        capsys.readouterr()
        prompt = ["--prompt", "red green", "--max-new-tokens", "8"]
        assert run(["generate", str(model), *options, *prompt]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", METHODS)
def test_over_bfloat16(name: str, tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    recipe = recipe_of(name, tiny_llama, tiny_bert, tmp_path, model__dtype="bfloat16")
    assert run(["train", str(recipe)]) == 0
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "lorakit.json").read_text())["base_dtype"] == "bfloat16"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    rounded = [t.to(torch.bfloat16).float().equal(t) for t in tensors.values()]
    assert not all(rounded), "the values that train are finer than bfloat16"
    assert lorakit.load(None, adapter).dtype == torch.bfloat16


def test_bitfit_on_a_model_without_biases(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe_file(tmp_path, tiny_llama, "completion")
    settings = json.loads(recipe.read_text())
    recipe.write_text(json.dumps(settings | {"adapter": {"method": "bitfit"}}))
    before = tree(tmp_path)
    assert run(["train", str(recipe)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert 'adapter.method = "bitfit": bitfit trains biases, and LlamaForCausalLM has none' in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["full", "intrinsic"])
def test_a_recipe_with_no_or_default_targets_repeats_itself(
    name: str, recipe: Path, tmp_path: Path
) -> None:
    assert run(["train", str(recipe)]) == 0
    resolved = lorakit.load_recipe(tmp_path / "run" / "recipe.yaml")
    assert resolved.adapter.target_modules == (None if name == "full" else ["all-linear"])
    assert resolved == lorakit.load_recipe(recipe)
