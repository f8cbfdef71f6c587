"""LoRA runs with biases, other initializations and slices: they resume exactly, and PEFT reads
their adapters.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

import lorakit
from tests.families import token_ids
from tests.training.runs import adapter_bytes, changed, recipe_for, run_json


@pytest.fixture(scope="module")
def tiny_gpt2(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random GPT-2 with the tokenizer of ``tiny_llama``."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    vocabulary = int(AutoModelForCausalLM.from_pretrained(tiny_llama).config.vocab_size)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=256,
                   bos_token_id=0, eos_token_id=1)
    ).save_pretrained(folder)  # fmt: skip
    return folder


#: The base's fixture, its dtype, and the adapter.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "all biases in bfloat16": ("tiny_bert", "bfloat16", {"bias": "all", "lora_dropout": 0.1}),
    "pissa in bfloat16": ("tiny_llama", "bfloat16", {"init": "pissa", "use_rslora": True}),
    "slices": (
        "tiny_gpt2", "float32", {"bias": "lora_only", "rank_pattern": {"v": 2}, "modules_to_save": ["wte"]}
    ),
    "pissa of slices in bfloat16": ("tiny_gpt2", "bfloat16", {"init": "pissa"}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_run_resumes_exactly_and_peft_reads_it(
    case: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    fixture, dtype, adapter = CASES[case]
    base = request.getfixturevalue(fixture)
    recipe = recipe_for(
        tmp_path,
        base,
        "glue/sst2" if fixture == "tiny_bert" else "completion",
        model__dtype=dtype,
        train__epochs=1,
        train__save_every_steps=2,
        train__save_total_limit=None,
        **{f"adapter__{key}": value for key, value in adapter.items()},
    )
    whole = lorakit.train(recipe).output_dir
    checkpoint = whole / "checkpoints" / "step-2"
    other = changed(recipe, train__output_dir=str(tmp_path / "other"))
    resumed = lorakit.train(other, resume=str(checkpoint)).output_dir
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    assert run_json(whole)["steps"] > 2

    auto = AutoModelForSequenceClassification if fixture == "tiny_bert" else AutoModelForCausalLM
    plain = auto.from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    theirs = PeftModel.from_pretrained(plain, str(whole / "adapter")).eval()
    ours = lorakit.load(base, whole / "adapter", dtype="float32")
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=0)
    assert (logits(ours) - before).abs().max() > 1e-3, "the adapter does something"
    stored = load_file(whole / "adapter" / "adapter_model.safetensors")
    ends = {name.rpartition(".")[2] for name in stored}
    assert ("bias" in ends) == (fixture == "tiny_bert" or "bias" in adapter)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=token_ids()).logits
    return out
