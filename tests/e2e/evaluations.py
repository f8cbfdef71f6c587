"""Recipes, adapters and commands for tests of ``lorakit eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.adapters.peft.write import save_adapter
from lorakit.cli.main import run
from lorakit.injection import inject, trainable_state
from lorakit.methods.lora import LoraConfig
from lorakit.models.load import load_pretrained
from lorakit.recipe.sections import ModelSection


def recipe_file(folder: Path, model: Path | str, task: str, path: Path, **keys: Any) -> Path:
    recipe = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "adapter": {"r": 2},
        "task": {"name": task, "path": str(path), "max_length": 128, **keys},
        "train": {"output_dir": str(folder / "run"), "seed": 5},
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return file


def write_adapter(
    model: Path, folder: Path, kind: str, labels: list[str] | None = None, scale: float = 1.0
) -> None:
    """Write an adapter with values other than the initial ones."""
    section = ModelSection(name_or_path=str(model), dtype="float32")
    loaded = load_pretrained(section, kind, labels, seed=1)  # type: ignore[arg-type]
    config = LoraConfig(r=2, target_modules=["q", "v"])
    report = inject(loaded.model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_state(loaded.model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    save_adapter(
        folder, loaded.model, config, base_model_name_or_path=str(model),
        task_type="CAUSAL_LM" if kind == "causal" else "SEQ_CLS",
        modules_to_save=report.modules_to_save, tokenizer=loaded.tokenizer,
    )  # fmt: skip


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Return the JSON object that is the only output on stdout."""
    code = run(["eval", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    assert set(result) == {"task", "split", "examples", "metrics"}
    return result
