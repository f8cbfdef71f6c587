"""Adapters of stacked experts in lorakit and PEFT: logits, training and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import inject, trainable_state
from lorakit.layers import adapter_layers
from lorakit.methods.lora import LoraConfig
from tests.families import logits, randomized, token_ids
from tests.hybrids import hybrid

pytestmark = pytest.mark.filterwarnings("ignore")

#: gpt_oss stores the transposed matrices.
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
TARGETS = {
    "experts": {"target_modules": ["experts"]},
    "one of two": {"target_parameters": ["experts.down_proj"]},
    "beside modules": {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj"]},
    "ranks": {
        "target_modules": ["experts"], "use_rslora": True, "layers": [1],
        "rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {"down_proj": 3},
    },
    "a router": {"target_parameters": ["mlp.gate.weight", "experts.down_proj"]},
}  # fmt: skip
CASES = [(family, "experts") for family in (*FAMILIES, "qwen3_next")]
CASES += [("qwen3_moe", case) for case in TARGETS if case != "experts"]


def saved(family: str, keys: dict[str, Any], folder: Path) -> nn.Module:
    """Write the adapter of a model, which is returned."""
    model, config = hybrid(family), LoraConfig(r=4, **keys)
    inject(model, config)
    randomized(model)
    save_adapter(folder, model, config, base_model_name_or_path="b", task_type="CAUSAL_LM")
    return model


@pytest.mark.parametrize(("family", "case"), CASES)
def test_peft_loads_ours(family: str, case: str, tmp_path: Path) -> None:
    ours = logits(saved(family, TARGETS[case], tmp_path / "a"))
    assert (ours - logits(hybrid(family))).abs().max() > 1e-3, "the adapter does something"
    theirs = PeftModel.from_pretrained(hybrid(family), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), ours, atol=1e-5, rtol=0)


def peft_model(family: str, **keys: Any) -> PeftModel:
    """A model with PEFT's adapter of all stacked experts, and of what ``keys`` say."""
    ends = ["experts.gate_up_proj", "experts.down_proj"]
    config = PeftLora(**{"r": 3, "target_modules": ["o_proj"], "target_parameters": ends, **keys})
    model: PeftModel = randomized(get_peft_model(hybrid(family), config))
    return model


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        *((family, {}) for family in FAMILIES),
        ("qwen3_moe", {"target_parameters": ["mlp.gate.weight", "experts.gate_up_proj"]}),
        ("qwen3_moe", {"target_parameters": ["1.mlp.experts.down_proj"]}),
        ("qwen3_moe", {"target_parameters": None, "target_modules": "all-linear"}),
        ("qwen3_moe", {"rank_pattern": {"down_proj": 2}, "use_rslora": True, "target_modules": []}),
    ],
)
def test_ours_loads_pefts(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft_model(family, **keys)
    theirs.save_pretrained(str(tmp_path / "a"))
    model = hybrid(family)
    load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "llama4_text"])
def test_merged_models_have_equal_logits(family: str, tmp_path: Path) -> None:
    """Both merge, from a checkpoint in which transformers stores experts one by one, but for Llama
    4's."""
    theirs = peft_model(family)
    theirs.save_pretrained(str(tmp_path / "a"))
    hybrid(family).save_pretrained(tmp_path / "base")
    lorakit.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    want = logits(theirs.merge_and_unload())
    torch.testing.assert_close(logits(merged), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_5_steps_of_adamw(family: str, tmp_path: Path) -> None:
    """From the same factors, gradients and trained values are equal."""
    ours = saved(family, TARGETS["experts"], tmp_path)
    theirs = PeftModel.from_pretrained(hybrid(family), str(tmp_path), is_trainable=True)
    for name, module in theirs.named_modules():
        module.train(name in ("", "base_model"))
    # A larger epsilon than the default, since AdamW amplifies the rounding of tiny gradients.
    settings = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-5}
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)
        for model in (ours, theirs)
    ]
    start = {name: value.detach().clone() for name, value in trainable_state(ours).items()}
    for step in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            out = model(input_ids=token_ids(4, 9, seed=step)).logits.flatten(0, 1)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(out, torch.arange(len(out)) % 64).backward()
            optimizer.step()
    state = theirs.state_dict()
    for name, layer in adapter_layers(ours).items():
        owner, _, end = name.rpartition(".")
        prefix = f"base_model.model.{owner}" + ".base_layer" * (end == "gate_up_proj")
        A, B = (state[f"{prefix}.lora_{factor}.default.weight"] for factor in "AB")
        torch.testing.assert_close(A.view(4, 4, -1), layer.lora_A, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            B.view(-1, 4, 4).permute(2, 0, 1), layer.lora_B, atol=1e-5, rtol=0
        )
        assert (start[f"{name}.lora_A"] - layer.lora_A).abs().max() > 5e-4
