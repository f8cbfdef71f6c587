"""A small base on disk and an adapter for it, for any method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakit import registry
from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import inject, trainable_state
from lorakit.recipe.sections import AdapterSection
from tests.families import tiny, token_ids


def config(method: str, **keys: Any) -> AdapterSection:
    section: AdapterSection = registry.methods()[method].Config(method=method, **keys)
    return section


def injected(
    family: str, section: AdapterSection, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    model = tiny(family, **changes).to(dtype)
    inject(model, section)
    return model


def pair(
    folder: Path,
    family: str,
    section: AdapterSection,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """Write ``folder/base`` and ``folder/adapter``; return the adapted model, whose trained parameters
    have changed as after training."""
    tiny(family, **changes).to(dtype).save_pretrained(folder / "base")
    model = injected(family, section, dtype, **changes)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save(folder, model, section)
    return model


def save(folder: Path, model: PreTrainedModel, section: AdapterSection) -> None:
    save_adapter(
        folder / "adapter",
        model,
        section,
        base_model_name_or_path=str(folder / "base"),
        task_type="SEQ_CLS" if "Classification" in type(model).__name__ else "CAUSAL_LM",
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(token_ids()).logits
    return out.float()


def loss(model: nn.Module) -> torch.Tensor:
    value: torch.Tensor = model(token_ids(seed=3)).logits.float().square().mean()
    return value
