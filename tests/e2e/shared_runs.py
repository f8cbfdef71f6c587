"""Runs in several processes, and the same in one."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from tests.training.runs import (
    log_lines,
    metrics_lines,
    run_json,
    without_dropout,
    write_recipe_file,
)

#: Trains the recipes that are its arguments, in one group of processes.
TRAIN = """
import sys, lorakit
from lorakit.api import process_group
with process_group():
    for recipe in sys.argv[1:]:
        lorakit.train(lorakit.load_recipe(recipe))
"""
LORA = {"method": "lora", "r": 4, "target_modules": ["q", "v"]}
ADALORA = {"method": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2}
#: 36 steps, with checkpoints in between.
STOPPED = {
    "train__epochs": 12, "train__save_every_steps": 4, "train__log_every_steps": 2,
    "train__per_device_batch_size": 4, "train__gradient_accumulation_steps": 3,
}  # fmt: skip

#: What ``accelerate launch`` sets from ``configs/fsdp2.yaml``.
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}  # fmt: skip


def recipe(folder: Path, model: Path, task: str, adapter: dict[str, Any], **changes: Any) -> Path:
    """A recipe whose steps have 12 rows, the last one of an epoch 6."""
    folder.mkdir(parents=True, exist_ok=True)
    changes = {"train__per_device_batch_size": 12} | changes
    file = write_recipe_file(folder, model, task, **changes)
    values = json.loads(file.read_text())
    values["adapter"] = adapter
    file.write_text(json.dumps(values))
    return file


def train_alone(
    folder: Path, llama: Path, bert: Path, runs: Mapping[str, tuple[dict[str, Any], dict[str, Any]]]
) -> dict[str, Path]:
    """Train each run, given as adapter and changes of the recipe, in one process; return the
    recipes. BitFit classifies, the others complete texts."""
    bert, recipes = without_dropout(bert, folder), {}
    for name, (adapter, changes) in runs.items():
        model, task = (bert, "glue/sst2") if name == "bitfit" else (llama, "completion")
        recipes[name] = recipe(folder / name, model, task, adapter, **changes)
        lorakit.train(lorakit.load_recipe(recipes[name]))
    return recipes


def split_over(processes: int, file: Path, folder: Path) -> Path:
    """The same recipe for several processes."""
    values = json.loads(file.read_text())
    values["train"]["per_device_batch_size"] = 12 // processes
    values["train"]["output_dir"] = str(folder / "run")
    folder.mkdir()
    shared = folder / "recipe.yaml"
    shared.write_text(json.dumps(values))
    return shared


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


def assert_equal(alone: Path, shared: Path) -> None:
    """The runs of two recipes have the same results, but for rounding in another order."""
    wanted, found = weights(alone.parent), weights(shared.parent)
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0, msg=f"{alone}: {key}")
    runs = alone.parent / "run", shared.parent / "run"
    for one, other in zip(*map(log_lines, runs), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], abs=1e-4)
    evaluations = [[line["eval"] for line in metrics_lines(run) if "eval" in line] for run in runs]
    assert evaluations[0]
    for one, other in zip(*evaluations, strict=True):
        assert other == pytest.approx(one, rel=1e-6, abs=1e-5)
    for key in ("steps", "trained_tokens", "ranks", "trainable_parameters"):
        assert run_json(runs[0])[key] == run_json(runs[1])[key]


def command(file: Path, folder: Path, *more: object) -> list[object]:
    return ["-m", "lorakit", "train", file, "--output-dir", folder, *more]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)
