"""Runs on a base whose checkpoint is quantized: train, evaluate, generate, merge, go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorakit
from lorakit.cli.main import run
from tests.adapters.quantized import quantized
from tests.families import token_ids
from tests.training.runs import eval_lines, log_lines, recipe_for


@pytest.fixture(scope="module")
def gptq_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(tiny_llama, folder / "plain")
    config = LlamaConfig.from_pretrained(
        tiny_llama, hidden_size=128, intermediate_size=256, head_dim=32
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "plain")
    quantized(folder / "plain", folder / "base", "gptq")
    return folder / "base"


def test_a_run_from_training_to_merging(
    gptq_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(tmp_path, gptq_llama)
    file = str(tmp_path / "recipe.yaml")
    assert [run(["validate", file]), run(["preview", file]), run(["train", file, "--dry-run"])] == [
        0
    ] * 3
    assert run(["train", file]) == 0
    adapter = tmp_path / "run" / "adapter"
    said = capsys.readouterr().err
    assert f"{gptq_llama}: gptq (4 bits), dequantized into float32" in said
    losses = [line["loss"] for line in log_lines(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3
    metrics = lorakit.evaluate(recipe)
    assert metrics["loss"] == pytest.approx(
        eval_lines(tmp_path / "run")[-1]["eval"]["loss"], abs=1e-5
    )

    command = ["generate", str(adapter), "--prompt", "red green", "--max-new-tokens", "4"]
    assert run(command) == 0
    answer = capsys.readouterr().out
    assert run(["merge", str(gptq_llama), str(adapter), str(tmp_path / "merged")]) == 0
    assert "dequantized into bfloat16; the merged model is not quantized" in capsys.readouterr().err
    assert run([*command[:1], str(tmp_path / "merged"), *command[2:], "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == answer
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in settings
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = token_ids()
    with torch.no_grad():
        want = lorakit.load(None, adapter)(ids).logits
        # The only difference is the rounding to bfloat16.
        torch.testing.assert_close(merged(ids).logits, want, atol=0.02, rtol=0.02)

    again = recipe_for(
        tmp_path / "again", gptq_llama, adapter__init_from=str(adapter), train__max_steps=2,
        train__epochs=None, model__base_precision="nf4",
    )  # fmt: skip
    pytest.importorskip("bitsandbytes")
    lorakit.train(again)
    assert log_lines(tmp_path / "again" / "run")[0]["loss"] < 1.1 * losses[-1]
