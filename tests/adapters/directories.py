"""Write bases and adapters to directories, and load them with plain transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from lorakit import registry
from lorakit.adapters.peft.schema import WEIGHTS
from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import inject
from tests.families import logits, tiny


def write_base(
    folder: Path, family: str = "llama", dtype: Any = torch.float32, **more: Any
) -> Path:
    tiny(family, **more).to(dtype).save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, seed: int = 0, scale: float = 0.1, **keys: Any) -> Path:
    """Write an adapter with random values for the model in ``base``; ``keys`` are recipe keys."""
    settings = json.loads((base / "config.json").read_text())
    classifies = "Classification" in settings["architectures"][0]
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    labels = {"id2label": keys.pop("id2label")} if "id2label" in keys else {}
    model = auto.from_pretrained(base, dtype="auto", ignore_mismatched_sizes=True, **labels)
    method = registry.methods()[keys.setdefault("method", "lora")]
    config = method.Config(**{"target_modules": ["attention"], **keys})
    torch.manual_seed(seed)
    inject(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    kind = "SEQ_CLS" if classifies else "CAUSAL_LM"
    return save_adapter(folder, model, config, base_model_name_or_path=str(base), task_type=kind)


def fresh(base: Path, **options: Any) -> PreTrainedModel:
    settings = json.loads((base / "config.json").read_text())
    classifies = "Classification" in settings["architectures"][0]
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(base, dtype="auto", **options)
    return model.eval()


def write_pair(folder: Path, family: str, **keys: Any) -> tuple[Path, Path]:
    """Write a base and an adapter for it; return both directories."""
    base = write_base(folder / "base", family)
    return base, write_adapter(base, folder / "adapter", **keys)


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    """Return the logits of the adapter as PEFT loads it."""
    labels = {"num_labels": 3} if "score" in str(list(load_file(adapter / WEIGHTS))) else {}
    return logits(PeftModel.from_pretrained(fresh(base, **labels), str(adapter)).eval())
