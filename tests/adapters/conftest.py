"""A small base on disk with a random adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import inject
from lorakit.methods.lora import LoraConfig
from tests.families import tiny

MakePair = Callable[..., tuple[Path, Path, PreTrainedModel]]


@pytest.fixture
def make_pair(tmp_path: Path) -> MakePair:
    """Return ``make_pair(family, adapter={...}, dtype=..., **changes)``, which writes a base and an
    adapter and returns both directories and the adapted model."""

    def make(
        family: str = "llama",
        adapter: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        **changes: Any,
    ) -> tuple[Path, Path, PreTrainedModel]:
        model = tiny(family, **changes).to(dtype)
        model.save_pretrained(tmp_path / "base", max_shard_size=max_shard_size)
        config = LoraConfig(**{"r": 4, "target_modules": ["attention"], **(adapter or {})})
        torch.manual_seed(0)
        inject(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        save_adapter(
            tmp_path / "adapter",
            model,
            config,
            base_model_name_or_path=str(tmp_path / "base"),
            task_type="SEQ_CLS" if "Classification" in type(model).__name__ else "CAUSAL_LM",
        )
        return tmp_path / "base", tmp_path / "adapter", model.eval()

    return make
