"""Adapters with the module names of older transformers, and without a task type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import lorakit
from lorakit.errors import AdapterError
from tests.adapters.checkpoints import write_model
from tests.adapters.directories import fresh, logits, peft_logits
from tests.families import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def write_peft(folder: Path, model: PreTrainedModel, **keys: Any) -> torch.Tensor:
    """Write an adapter of PEFT with random values; return the logits of the adapted model."""
    adapted = get_peft_model(model, PeftLora(**{"r": 4, "task_type": "CAUSAL_LM", **keys}))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(folder)
    return logits(adapted.eval())


def rename(folder: Path, old: Callable[[str], str], **config: Any) -> None:
    """Give the tensors their ``old`` names, and change ``adapter_config.json``."""
    file = folder / "adapter_model.safetensors"
    save_file({old(name): value for name, value in load_file(file).items()}, file)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))


def test_modules_that_transformers_has_renamed(tmp_path: Path) -> None:
    """Nemotron-H's ``backbone`` is ``model`` now, also in a pattern."""
    config = tf.NemotronHConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, mamba_num_heads=4, mamba_head_dim=4, ssm_state_size=4,
        n_groups=1, layers_block_type=["mamba", "attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tf.NemotronHForCausalLM(config).save_pretrained(base)
    ranks = {"q_proj": 2}
    want = write_peft(adapter, fresh(base), target_modules=["q_proj", "o_proj"], rank_pattern=ranks)
    old = {"backbone.layers.1.mixer.q_proj": 2}
    rename(
        adapter,
        lambda n: n.replace("model.model.layers", "model.backbone.layers"),
        rank_pattern=old,
    )
    torch.testing.assert_close(logits(lorakit.load(base, adapter)), want, atol=1e-5, rtol=0)
    lorakit.merge(base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(fresh(tmp_path / "out")), want, atol=1e-5, rtol=0)
    rename(
        adapter,
        lambda n: n.replace("backbone", "spine"),
        rank_pattern={},
        target_modules=["x_proj"],
    )
    with pytest.raises(AdapterError, match="the model has no module for spine"):
        lorakit.load(base, adapter)


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], r"^language_model\.model\.layers\.\d+\.self_attn\.(q|v)_proj$"],
    ids=["suffixes", "pattern"],
)  # fmt: skip
def test_a_multimodal_model_of_before(targets: list[str] | str, tmp_path: Path) -> None:
    """``language_model.model.layers`` became ``model.language_model.layers``."""
    base, adapter = write_model(tmp_path / "base", "gemma3"), tmp_path / "adapter"
    new = r".*language_model.*\.(q|v)_proj"
    want = write_peft(adapter, fresh(base), target_modules=new)
    rename(
        adapter, lambda n: n.replace("model.language_model.layers", "language_model.model.layers"),
        target_modules=targets,
    )  # fmt: skip
    if isinstance(targets, list):
        theirs = PeftModel.from_pretrained(fresh(base), str(adapter))
        torch.testing.assert_close(logits(theirs.eval()), want)
        rename(adapter, str, exclude_modules="vision_tower.*")
    torch.testing.assert_close(logits(lorakit.load(base, adapter)), want, atol=1e-5, rtol=0)
    lorakit.merge(base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(fresh(tmp_path / "out")), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"target_modules": ["q_proj"]}),
        ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
        ("bert", {"target_modules": ["query"]}),
    ],
    ids=["causal", "classifier", "classifier without its head"],
)
def test_without_a_task_type(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path / "base")
    want = write_peft(tmp_path / "adapter", tiny(family), task_type=None, **keys)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] is None
    assert settings["auto_mapping"]
    got = logits(lorakit.load(tmp_path / "base", tmp_path / "adapter"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(peft_logits(tmp_path / "base", tmp_path / "adapter"), want)
    lorakit.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(logits(fresh(tmp_path / "out")), want, atol=1e-5, rtol=0)
