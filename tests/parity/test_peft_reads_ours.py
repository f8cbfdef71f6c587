"""PEFT loads lorakit's adapters with equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification

from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import inject
from lorakit.layers import adapted_modules
from lorakit.methods.lora import LoraConfig
from tests.families import ENCODERS, logits, randomized, tiny

pytestmark = pytest.mark.filterwarnings("ignore")

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "roles": ("llama", {}, {}),
    "rslora": ("llama", {"use_rslora": True}, {}),
    "ranks": (
        "llama",
        {"rank_pattern": {"0.self_attn.q_proj": 2, "v_proj": 3}, "alpha_pattern": {"1.self_attn.v_proj": 4}},
        {},
    ),
    "layers": ("llama", {"target_modules": ["all-linear"], "layers": [1]}, {}),
    "regex": ("llama", {"target_modules": ["re:.*0.mlp.*"]}, {}),
    "output": ("llama", {"target_modules": ["q", "lm_head"]}, {}),
    "whole c_attn": ("gpt2", {"target_modules": ["c_attn"]}, {}),
    "all Conv1D": ("gpt2", {"target_modules": ["all-linear"]}, {}),
    "o of gpt2": ("gpt2", {"target_modules": ["o"]}, {}),
    "embeddings": ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"]}, {}),
    "tied embeddings": ("llama", {"target_modules": ["embed_tokens", "v"]}, {"tie_word_embeddings": True}),
    "scaled embeddings": ("gemma3", {"target_modules": ["embed_tokens", "v"]}, {}),
    "trained embeddings": ("llama", {"modules_to_save": ["embed_tokens"]}, {}),
    "trained tied embeddings": (
        "llama", {"modules_to_save": ["embed_tokens"]}, {"tie_word_embeddings": True}
    ),
    "trained norm": ("llama", {"modules_to_save": ["1.input_layernorm"]}, {}),
    "score": ("llama", {}, {"classifier": True}),
    "a classifier of gpt2": ("gpt2", {"target_modules": ["c_attn"]}, {"classifier": True, "pad_token_id": 0}),
    **{f"{family} classifier": (family, {"target_modules": ["attention"]}, {}) for family in ENCODERS},
    "adapted biases": ("llama", {"bias": "lora_only"}, {"attention_bias": True}),
    "adapted biases of Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only"}, {}),
    "adapted biases, there are none": ("llama", {"bias": "lora_only"}, {}),
    "the bias of a fused projection": ("gpt2", {"target_modules": ["v"], "bias": "lora_only"}, {}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}, {}),
    "all biases and trained norms": (
        "opt", {"bias": "all", "modules_to_save": ["final_layer_norm"]}, {}
    ),
    "adapted biases of a classifier": ("bert", {"bias": "lora_only"}, {}),
    **{f"all biases of a {family} classifier": (family, {"target_modules": ["attention"], "bias": "all"}, {})
       for family in ("bert", "roberta", "distilbert", "albert")},
    "pissa": ("gpt2", {"target_modules": ["all-linear", "wte"], "init": "pissa"}, {}),
    "pissa of different ranks": (
        "llama", {"init": "pissa", "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"1.self_attn.v_proj": 5}}, {}
    ),
    "pissa, rslora": ("llama", {"init": "pissa", "use_rslora": True}, {}),
    "orthogonal": ("llama", {"init": "orthogonal"}, {}),
    "b_gaussian": ("gpt2", {"init": "b_gaussian", "target_modules": ["wte", "c_attn"]}, {}),
    "dense of attention only": ("bert", {"target_modules": ["o"]}, {}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "given"),
    [(case, False) for case in CASES] + [(case, True) for case in CASES if "trained" in case],
)
def test_equal_logits(case: str, given: bool, tmp_path: Path) -> None:
    """``given``: the fully trained modules are those of the report, else what requires
    gradients."""
    family, adapter, changes = CASES[case]
    model, base = tiny(family, **changes), tiny(family, **changes)
    config = LoraConfig(**{"r": 4, "target_modules": ["q", "v"], **adapter})
    report = inject(model, config)
    ours = logits(randomized(model))
    classifies = "Classification" in type(model).__name__
    save_adapter(
        tmp_path / "adapter",
        model,
        config,
        base_model_name_or_path="base",
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
        modules_to_save=report.modules_to_save if given else None,
    )
    before = logits(base)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert (ours - before).abs().max() > 1e-3, "the adapter does something"
    torch.testing.assert_close(logits(theirs), ours, atol=1e-5, rtol=0)
    adapted = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(adapted_modules(model))


def test_a_real_encoder(tmp_path: Path, minilm: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
        return model

    model, config = base(), LoraConfig(target_modules=["q", "v", "o"])
    inject(model, config)
    ours = logits(randomized(model))
    save_adapter(
        tmp_path / "a", model, config, base_model_name_or_path=str(minilm), task_type="SEQ_CLS"
    )
    theirs = PeftModel.from_pretrained(base(), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), ours, atol=1e-5, rtol=0)


def test_peft_would_write_the_same_configuration(tmp_path: Path) -> None:
    """Equal key by key, except for what depends on the version and for the order of a set."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    from lorakit.adapters.peft.schema import DEFAULTS

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"])
    model = tiny("llama")
    inject(model, config)
    save_adapter(
        tmp_path / "ours", model, config, base_model_name_or_path="b", task_type="CAUSAL_LM"
    )
    peft_config = PeftLora(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    get_peft_model(tiny("llama"), peft_config).save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("ours", "theirs")
    )
    for settings in (ours, theirs):
        settings["target_modules"] = sorted(settings["target_modules"])
        del settings["base_model_name_or_path"]
    assert {key: theirs.get(key, "absent") for key in ours} == ours
    assert set(DEFAULTS) <= set(theirs)


def test_the_file_is_as_peft_writes_it(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from safetensors import safe_open

    def described(folder: Path) -> tuple[dict[str, str], list[tuple[str, list[int], str]]]:
        with safe_open(folder / "adapter_model.safetensors", "pt") as stored:
            parts = [(name, stored.get_slice(name)) for name in stored.keys()]  # noqa: SIM118
            shapes = [(name, part.get_shape(), part.get_dtype()) for name, part in parts]
            return stored.metadata(), shapes

    targets = ["query", "word_embeddings"]
    model, config = tiny("bert"), LoraConfig(r=4, target_modules=targets)
    inject(model, config)
    save_adapter(tmp_path / "ours", model, config, base_model_name_or_path="b", task_type="SEQ_CLS")
    theirs = get_peft_model(
        tiny("bert"), PeftLora(r=4, target_modules=targets, task_type="SEQ_CLS")
    )
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert described(tmp_path / "ours") == described(tmp_path / "theirs")
