"""Runs that adapt stacked experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.errors import AdapterError
from lorakit.recipe.sections import Recipe
from lorakit.training.engine.eager import EagerEngine
from lorakit.training.joint.joinable import can_join
from lorakit.training.run import train
from tests.families import token_ids
from tests.hybrids import saved_hybrid
from tests.training.runs import (
    adapter_bytes,
    changed,
    learning,
    log_lines,
    run_json,
    write_recipe_file,
)

EXPERTS = {"r": 4, "target_modules": ["q", "experts"]}
PLUS = {
    "method": "lora_plus", "r": 2, "target_parameters": ["mlp.experts.down_proj"],
    "loraplus_lr_ratio": 4.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def moe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "mixtral"
    return saved_hybrid("mixtral", tiny_llama, folder)


def recipe_of(folder: Path, model: Path, adapter: dict[str, Any], **changes: Any) -> Recipe:
    file = write_recipe_file(folder, model, "completion", **changes)
    return lorakit.load_recipe(file, {"adapter": adapter})


@pytest.fixture(scope="module")
def trained(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe of 6 steps that has been trained, with checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = recipe_of(
        folder, moe, EXPERTS, train__epochs=None, train__max_steps=6, train__save_every_steps=3
    )
    train(recipe)
    return recipe


def test_the_adapter_loads_merges_and_is_evaluated(trained: Recipe, tmp_path: Path) -> None:
    run = Path(trained.train.output_dir)
    losses = [line["loss"] for line in log_lines(run)]
    assert losses[-1] < losses[0]
    names = {module["name"] for module in run_json(run)["adapted_modules"]}
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    base = trained.model.name_or_path
    loaded = lorakit.load(base, run / "adapter")
    lorakit.merge(base, run / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(token_ids()).logits, merged(token_ids()).logits, atol=1e-5, rtol=0
        )
    found = lorakit.evaluate(trained, adapter=run / "adapter")
    assert found["loss"] == pytest.approx(run_json(run)["metrics"]["loss"], abs=1e-5)


def test_a_killed_run_resumes_exactly(
    trained: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(trained.train.output_dir)
    recipe = changed(trained, train__output_dir=str(tmp_path / "run"))
    own = EagerEngine.step

    def until(engine: EagerEngine, *batches: Any) -> Any:
        if engine.steps == 4:
            raise KeyboardInterrupt
        return own(engine, *batches)

    with monkeypatch.context() as patch:
        patch.setattr(EagerEngine, "step", until)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    train(recipe, resume="auto")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(run)
    assert learning(tmp_path / "run") == learning(run)


def test_gradient_checkpointing_and_half_precision(trained: Recipe, tmp_path: Path) -> None:
    """The same values with checkpointing; with a half-precision base, factors are float32."""
    spared = changed(
        trained, train__output_dir=str(tmp_path / "spared"), train__gradient_checkpointing=True
    )
    want = load_file(Path(trained.train.output_dir) / "adapter" / "adapter_model.safetensors")
    found = load_file(train(spared).adapter_dir / "adapter_model.safetensors")
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)
    half = changed(trained, train__output_dir=str(tmp_path / "half"), model__dtype="bfloat16")
    found = load_file(train(half).adapter_dir / "adapter_model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float32}
    losses = [line["loss"] for line in log_lines(tmp_path / "half")]
    assert losses[-1] < losses[0]


def test_a_run_starts_from_the_adapter(trained: Recipe, moe: Path, tmp_path: Path) -> None:
    """Targets and ranks are the adapter's, and so is the first loss."""
    keys = {"init_from": str(Path(trained.train.output_dir) / "adapter")}
    recipe = recipe_of(tmp_path, moe, keys, train__epochs=None, train__max_steps=1)
    run = train(recipe)
    found = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert found["target_parameters"] == ["down_proj", "gate_up_proj"]
    assert run.metrics["loss"] < log_lines(Path(trained.train.output_dir))[0]["loss"]


def test_lora_plus_has_its_rates_on_experts(moe: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, moe, PLUS, train__epochs=None, train__max_steps=2)
    run = train(recipe)
    lines = log_lines(run.output_dir)
    assert lines[0]["learning_rate_B"] == pytest.approx(4 * lines[0]["learning_rate"])
    assert run_json(run.output_dir)["adapted_modules"][0]["shape"] == [16, 24]


def test_adalora_gives_each_expert_its_rank(moe: Path, tmp_path: Path) -> None:
    """Saved as LoRA, in PEFT's form. 2 layers of 4 experts, and q: 18 matrices."""
    adapter = {
        "method": "adalora", "target_modules": ["q", "experts"], "init_r": 4, "target_r": 2,
        "tinit": 1, "tfinal": 2, "deltaT": 1,
    }  # fmt: skip
    recipe = recipe_of(tmp_path, moe, adapter, train__epochs=None, train__max_steps=8)
    said: list[str] = []
    run = train(recipe, say=said.append)
    ranks = {entry["module"]: entry["rank"] for entry in run_json(run.output_dir)["ranks"]}
    assert len(ranks) == 18 and sum(ranks.values()) == 36 and len(set(ranks.values())) > 2
    own = [ranks[f"model.layers.0.mlp.experts.down_proj[{expert}]"] for expert in range(4)]
    modules = {m["name"]: m["r"] for m in run_json(run.output_dir)["adapted_modules"]}
    assert modules["model.layers.0.mlp.experts.down_proj"] == max(own)
    [table] = [text for text in said if "experts.down_proj" in text and "total" in text]
    assert f" {sum(own)} " in table.splitlines()[1]
    model = lorakit.load(moe, run.adapter_dir)
    base = AutoModelForCausalLM.from_pretrained(moe).eval()
    theirs = PeftModel.from_pretrained(base, str(run.adapter_dir)).eval()
    with torch.no_grad():
        found = model(token_ids()).logits
        torch.testing.assert_close(theirs(token_ids()).logits, found, atol=1e-5, rtol=0)
    metrics = lorakit.evaluate(recipe, adapter=run.adapter_dir)
    assert metrics["loss"] == pytest.approx(run.metrics["loss"], abs=1e-5)


def test_what_is_not_supported_is_refused(trained: Recipe, moe: Path, tmp_path: Path) -> None:
    adapter = Path(trained.train.output_dir) / "adapter"
    with pytest.raises(AdapterError, match=r"target_parameters = .*can only be loaded and merged"):
        lorakit.convert(adapter, tmp_path / "out", to="lora")
    with pytest.raises(AdapterError, match=r"target_parameters = .*can only be loaded and merged"):
        lorakit.inspect(adapter)
    model = lorakit.load(moe, {"a": adapter})
    with pytest.raises(AdapterError, match=r"merged = True: not supported for .*mlp\.experts"):
        lorakit.switch(model, "a", merged=True)
    lorakit.switch(model, None)
    reason = can_join(trained, trained)
    assert reason == "adapter adapts parameters of a module, such as experts"
