"""lorakit loads PEFT's adapters with equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.adapters.peft.place import load_adapter
from tests.families import logits, randomized, tiny, token_ids

pytestmark = pytest.mark.filterwarnings("ignore")

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "suffixes": ("llama", {"target_modules": ["q_proj", "v_proj"]}, {}),
    "regex": ("llama", {"target_modules": r".*\.1\..*(gate|k)_proj"}, {}),
    "all-linear": ("llama", {"target_modules": "all-linear"}, {}),
    "layers": ("llama", {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}, {}),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, {}),
    "ranks": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.[1].self_attn.v_proj": 6},
            "alpha_pattern": {"1.self_attn.q_proj": 32},
        },
        {},
    ),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}, {}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, {}),
    "whole c_attn": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, {}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "tied embedding": (
        "llama", {"target_modules": ["embed_tokens"]}, {"tie_word_embeddings": True}
    ),
    "scaled embedding": ("gemma2", {"target_modules": ["embed_tokens"]}, {}),
    "trained embedding": (
        "llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, {}
    ),
    "one side of tied embeddings trained": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"tie_word_embeddings": True},
    ),
    "classifier": ("bert", {"target_modules": ["query"]}, {}),
    "classifier of two layers": ("roberta", {"target_modules": ["query"]}, {}),
    "pre_classifier": ("distilbert", {"target_modules": ["q_lin"]}, {}),
    "adapted biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}, {}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}, {}),
    "adapted biases of a classifier": ("bert", {"target_modules": ["query"], "bias": "lora_only"}, {}),
    "all biases of a classifier": ("bert", {"target_modules": ["query"], "bias": "all"}, {}),
    "all biases of a classifier of two layers": ("roberta", {"target_modules": ["query"], "bias": "all"}, {}),
    "all biases of a pre_classifier": ("distilbert", {"target_modules": ["q_lin"], "bias": "all"}, {}),
    "all biases beside a trained norm": (
        "opt", {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["final_layer_norm"]}, {}
    ),
    "score": ("llama", {"target_modules": ["q_proj"]}, {"classifier": True}),
}  # fmt: skip


def peft_model(case: str) -> nn.Module:
    family, adapter, changes = CASES[case]
    base = tiny(family, **changes)
    task = "SEQ_CLS" if "Classification" in type(base).__name__ else "CAUSAL_LM"
    model = get_peft_model(base, PeftLora(r=4, lora_alpha=8, task_type=task, **adapter))
    return randomized(model)


@pytest.mark.parametrize("case", CASES)
def test_equal_logits(case: str, tmp_path: Path) -> None:
    theirs = peft_model(case)
    theirs.save_pretrained(tmp_path)
    family, _, changes = CASES[case]
    ours = tiny(family, **changes)
    before = logits(ours)
    load_adapter(ours, tmp_path)
    assert not any(p.requires_grad for p in ours.parameters())
    want = logits(theirs)
    torch.testing.assert_close(logits(ours), want, atol=1e-5, rtol=0)
    assert (want - before).abs().max() > 1e-3, "the adapter does something"


_WHOLE = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [64, 66])
@pytest.mark.parametrize(
    "adapter",
    [_WHOLE, {"target_modules": ["q_proj"]}, {"target_modules": ["embed_tokens", "lm_head"]}],
    ids=["whole", "beside", "factors"],
)
def test_saved_embeddings(adapter: dict[str, Any], rows: int, tied: bool, tmp_path: Path) -> None:
    """PEFT saves resized embeddings with every adapter, and the base is extended to them; fully
    trained ones appear under three names."""
    base = tiny("llama", tie_word_embeddings=tied)
    base.resize_token_embeddings(rows)
    theirs = get_peft_model(base, PeftLora(r=4, task_type="CAUSAL_LM", **adapter))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = tiny("llama", tie_word_embeddings=tied)
    load_adapter(ours, tmp_path)
    ids = torch.cat([token_ids(), torch.tensor([[rows - 1, rows - 2]] * 2)], dim=1)
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_base_weight_that_peft_saved_goes_through_loralib_and_back(
    module: str, tmp_path: Path
) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = PeftLora(r=4, task_type="CAUSAL_LM", target_modules=[module, "q_proj"])
    theirs = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    there = lorakit.convert(tmp_path / "a", tmp_path / "there", "loralib").path
    back = lorakit.convert(there, tmp_path / "back", "peft").path
    names = [set(load_file(d / "adapter_model.safetensors")) for d in (tmp_path / "a", back)]
    assert names[0] == names[1]
    assert any("base_layer.weight" in name for name in names[1])
    ids = token_ids()
    ours = lorakit.load(tmp_path / "base", back)
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_over_a_bfloat16_base(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny("llama").to(dtype)
    model = get_peft_model(base, PeftLora(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight)
    model.save_pretrained(tmp_path)
    ours = tiny("llama").to(dtype)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), atol=2e-2, rtol=2e-2)
