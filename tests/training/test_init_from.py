"""Runs that start from an adapter: ``adapter.init_from``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.cli.main import run
from lorakit.errors import UserError
from lorakit.evaluation.evaluate import evaluate_model
from lorakit.recipe.sections import Recipe
from lorakit.training.run import train
from lorakit.training.setup import prepare
from tests.training.runs import (
    adapter_bytes,
    changed,
    eval_lines,
    learning,
    run_json,
    write_recipe_file,
)

#: AdaLoRA prunes in 12 steps.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "lora_alpha": 5, "target_modules": ["q", "o"]},
    "adalora": {"method": "adalora", "init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 2,
                "deltaT": 1, "target_modules": ["q", "v"]},
}  # fmt: skip


def recipe_of(
    folder: Path, model: Path, task: str, adapter: dict[str, Any], **changes: Any
) -> Recipe:
    """A recipe whose adapter has no other keys than ``adapter``."""
    file = write_recipe_file(folder, model, task, **changes)
    return lorakit.load_recipe(file, {"adapter": adapter})


def in_folder(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with another output directory, and otherwise with the same keys set."""
    section = recipe.train.model_copy(update={"output_dir": str(folder)})
    return recipe.model_copy(update={"train": section})


def first_metrics(recipe: Recipe) -> dict[str, float]:
    """The evaluation before the first step."""
    prepared = prepare(recipe, lambda text: None)
    assert prepared.evaluation is not None
    return evaluate_model(
        prepared.model, prepared.tokenizer, prepared.evaluation, batch_size=8, parts=None,
        generate=False, seed=7,
    ).metrics  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["completion", "glue/sst2"])
def test_the_first_evaluation_is_that_of_the_adapter(
    task: str, method: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: Path = request.getfixturevalue("tiny_llama" if task == "completion" else "tiny_bert")
    recipe = recipe_of(tmp_path, model, task, METHODS[method], train__epochs=3)
    metrics = train(recipe).metrics
    adapter = tmp_path / "run" / "adapter"
    keys = {"init_from": str(adapter), "method": METHODS[method].get("method", "lora")}
    new = in_folder(recipe_of(tmp_path, model, task, keys), tmp_path / "new")
    found = first_metrics(new)
    assert found == pytest.approx({key: metrics[key] for key in found}, abs=1e-6)


def test_the_run_is_recorded_and_resumes_without_the_adapter(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Also from its own recipe.yaml, which has the keys of the adapter."""
    train(recipe_of(tmp_path, tiny_llama, "completion", METHODS["lora"]))
    adapter = tmp_path / "first"
    (tmp_path / "run" / "adapter").rename(adapter)
    keys = {"init_from": str(adapter)}
    recipe = in_folder(
        recipe_of(tmp_path, tiny_llama, "completion", keys, train__save_every_steps=3,
                  train__save_total_limit=None), tmp_path / "new")  # fmt: skip
    said: list[str] = []
    train(recipe, say=said.append)
    whole = adapter_bytes(tmp_path / "new"), learning(tmp_path / "new")
    [line] = [line for line in said if line.startswith("starting from")]
    assert "r = 3, lora_alpha = 5, target_modules = " in line
    recorded = run_json(tmp_path / "new")["init_from"]
    assert recorded["adapter"] == str(adapter)
    assert len(recorded["fingerprint"]) == 64
    again = lorakit.load_recipe(tmp_path / "new" / "recipe.yaml")
    assert (again.adapter.init_from, again.adapter.r) == (str(adapter), 3)  # type: ignore[attr-defined]
    train(in_folder(again, tmp_path / "again"))
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "new")
    shutil.rmtree(adapter)
    for resumed in (recipe, again):
        train(resumed, str(tmp_path / "new" / "checkpoints" / "step-3"))
        assert (adapter_bytes(tmp_path / "new"), learning(tmp_path / "new")) == whole
        assert run_json(tmp_path / "new")["init_from"] == recorded
    with pytest.raises(UserError, match=r"adapter\.init_from: was .*, now null"):
        train(changed(again, adapter__init_from=None), "auto")


def test_from_peft(tiny_llama: Path, tmp_path: Path) -> None:
    import peft

    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(tmp_path / "peft"))
    recipe = recipe_of(tmp_path, tiny_llama, "completion", {"init_from": str(tmp_path / "peft")})
    metrics = lorakit.evaluate(recipe, adapter=tmp_path / "peft")
    assert first_metrics(recipe)["loss"] == pytest.approx(metrics["loss"], abs=1e-6)
    train(recipe)
    losses = [line["eval"]["loss"] for line in eval_lines(tmp_path / "run")]
    assert losses[-1] < metrics["loss"]


def test_the_command_names_the_line(
    tiny_llama: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_recipe_file(in_tmp, tiny_llama, "completion", adapter__init_from="none")
    assert run(["train", str(file)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f'error: {file}, line 1: adapter.init_from = "none": no such adapter directory; an '
        "adapter on the Hub is named namespace/name"
    )
    assert not (in_tmp / "run").exists()
