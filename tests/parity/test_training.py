"""The same training in lorakit and PEFT: gradients and 50 steps of AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import inject, trainable_state
from lorakit.methods.lora import LoraConfig
from tests.families import tiny, token_ids

pytestmark = pytest.mark.filterwarnings("ignore")


def _pair(family: str, keys: dict[str, Any], folder: Path) -> tuple[nn.Module, nn.Module]:
    """Return a lorakit model and a PEFT model with the same adapter, both further trained."""
    model, config = tiny(family), LoraConfig(r=4, **keys)
    torch.manual_seed(0)
    inject(model, config)
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    save_adapter(folder, model, config, base_model_name_or_path="b", task_type=task)
    theirs = PeftModel.from_pretrained(tiny(family), str(folder), is_trainable=True)
    return model, theirs


def _theirs(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return PEFT's parameters by lorakit's names."""
    named = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            for factor in "AB":
                name = name.replace(f"lora_{factor}.default.weight", f"lora_{factor}")
                name = name.replace(f"lora_embedding_{factor}.default", f"lora_{factor}")
            named[name] = parameter
    return named


def _loss(model: nn.Module, step: int) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=token_ids(4, 9, seed=step)).logits
    return torch.nn.functional.cross_entropy(
        out.reshape(-1, out.shape[-1]), torch.arange(out[..., 0].numel()) % out.shape[-1]
    )


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q", "v"]}),
    "every linear and the embedding": ("llama", {"target_modules": ["all-linear", "embed_tokens"]}),
    "rslora": ("llama", {"use_rslora": True, "rank_pattern": {"v_proj": 2}}),
    "adapted biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "classifier": ("bert", {"target_modules": ["q", "v"]}),
    "adapted biases of a classifier, orthogonal": (
        "bert",
        {"bias": "lora_only", "init": "orthogonal"},
    ),
}


@pytest.mark.parametrize(("family", "keys"), CASES.values(), ids=CASES)
def test_50_steps_of_adamw(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = _pair(family, keys, tmp_path)
    mine, other = trainable_state(ours), _theirs(theirs)
    assert set(mine) == set(other)
    optimizers = [
        torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.01)
        for parameters in (mine, other)
    ]
    start = {name: value.detach().clone() for name, value in mine.items()}
    for step in range(50):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = _loss(model, step)
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
        for name, value in mine.items():
            torch.testing.assert_close(value.grad, other[name].grad, atol=1e-5, rtol=1e-3)
        for optimizer in optimizers:
            optimizer.step()
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], atol=1e-5, rtol=0)
    assert all((mine[n] - start[n]).abs().max() > 1e-3 for n in mine), "all of it was trained"
