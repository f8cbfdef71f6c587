"""Joint training of models that differ from BERT and Llama: fused projections, shared layers,
tables of relative positions, experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from tests.families import CAUSAL
from tests.training.joint_runs import assert_equal_to_single_runs, members, save_family

CHANGES: list[dict[str, Any]] = [
    {"train__seed": 1, "adapter__target_modules": ["q", "v"]},
    {"adapter__target_modules": ["all-linear"], "adapter__lora_dropout": 0.1},
    {"adapter": {"method": "dora", "target_modules": ["q", "v"]}},
]


@pytest.mark.parametrize("family", ["gpt2", "phi3", "bloom", "roberta", "albert", "modernbert"])
def test_families(tiny_llama: Path, tiny_bert: Path, tmp_path: Path, family: str) -> None:
    causal = family in CAUSAL
    model = save_family(family, tiny_llama if causal else tiny_bert, tmp_path / "model")
    common = {"train__epochs": 1} if causal else {"train__epochs": 1, "model__new_head": True}
    task = "completion" if causal else "glue/sst2"
    assert_equal_to_single_runs(members(tmp_path, model, task, CHANGES, **common), 2e-5)


def test_a_table_that_all_rows_share(tiny_bert: Path, tmp_path: Path) -> None:
    """DeBERTa projects its table of relative positions with the adapted q and k."""
    model = save_family("deberta_v2", tiny_bert, tmp_path / "model")
    common = {"train__epochs": 1, "model__new_head": True}
    recipes = members(tmp_path, model, "glue/sst2", CHANGES[:2], **common)
    assert_equal_to_single_runs(recipes, 2e-5)


def test_a_model_with_experts(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
    sizes = {key: config[key] for key in keys}
    MixtralForCausalLM(
        MixtralConfig(
            **sizes, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4, num_experts_per_tok=2,
        )
    ).save_pretrained(model)  # fmt: skip
    changes = [{"train__seed": 1}, {"adapter__r": 2}]
    assert_equal_to_single_runs(members(tmp_path, model, "completion", changes, train__epochs=1))
