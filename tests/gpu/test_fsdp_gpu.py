"""FSDP2 on two GPUs: the results of one, and half of the frozen weights on each, unless they are few."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lorakit
from tests.e2e.processes import REPO, environments
from tests.e2e.shared_runs import LORA, recipe, split_over
from tests.e2e.test_fsdp import FSDP
from tests.training.runs import log_lines, run_json

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
]
#: In float32, more than 1/32 of the memory of a GPU of 141 GB; in bfloat16 less.
LAYERS, HIDDEN = 24, 2048
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": (LORA, {"train__compile": False}),
    "dora": (LORA | {"method": "dora"}, {"train__compile": False}),
    "checkpointed": (LORA, {"train__compile": False, "train__gradient_checkpointing": True}),
    "offloaded": (LORA, {"train__compile": False, "train__gradient_checkpointing": "offload"}),
    "compiled": (LORA, {"train__compile": True}),
    # Few enough weights to stay whole.
    "small": (LORA, {"train__compile": True, "model__dtype": "bfloat16"}),
}


@pytest.fixture(scope="module")
def wide_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4.8 GB in float32, nearly all of it in its layers."""
    folder = tmp_path_factory.mktemp("wide-llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=8,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_gpus_equal_one(variant: str, wide_llama: Path, tmp_path: Path) -> None:
    adapter, changes = VARIANTS[variant]
    changes = {"train__learning_rate": 1e-4} | changes
    alone = recipe(tmp_path / "alone", wide_llama, "completion", adapter, **changes)
    lorakit.train(lorakit.load_recipe(alone))
    shared = split_over(2, alone, tmp_path / "shared")
    # Not forked: a parent that has asked for the GPUs cannot fork processes that use them.
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "lorakit", "train", str(shared)], cwd=REPO,
            stderr=subprocess.PIPE, text=True,
            env=os.environ | variables | FSDP | {"CUDA_VISIBLE_DEVICES": "0,1"},
        )
        for variables in environments(2)
    ]  # fmt: skip
    said = ""
    for process in processes:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        said += err
    assert ("are not sharded" in said) == (variant == "small")
    runs = tmp_path / "alone" / "run", tmp_path / "shared" / "run"
    tolerance = 2e-2 if variant in ("compiled", "small") else 1e-4
    for one, other in zip(*map(log_lines, runs), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=tolerance)
    if variant == "checkpointed":  # what else is on the device is small
        whole, half = (run_json(run)["peak_memory_bytes"] for run in runs)
        layer = 4 * HIDDEN**2 * 12
        assert half < whole - LAYERS * layer / 2 + 4 * layer
