"""Run directories with the files that a report reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECIPE = """model: {name_or_path: models/base, dtype: float32}
adapter: {method: METHOD, r: 8, init_r: 3}
task: {name: glue/rte}
train: {output_dir: OUTPUT, seed: 1}
"""
RECORD = {
    "adapted_modules": [
        {"name": f"model.layers.{layer}.attn.{role}_proj", "shape": [8, 8], "r": 2}
        for layer in (0, 1)
        for role in "qv"
    ],
    "trainable_parameters": 1024, "steps": 4, "trained_tokens": 640, "seconds": 75.0,
    "peak_memory_bytes": 2**30, "metrics": {"loss": 0.5, "accuracy": 0.75}, "best_step": 4,
    "versions": {"torch": "2.9"}, "hardware": {"cpu": "x86"}, "git_commit": None,
    "data": {"train": {"source": "a", "rows": 10, "fingerprint": "f" * 64}},
    "diverged": False, "exit_reason": "completed", "message": None,
}  # fmt: skip
PREDICTIONS = {
    "split": "validation", "rows": 5, "step": 4, "labels": ["no", "yes"],
    "confusion": [[2, 1], [0, 2]],
    "examples": [
        {"row": 2, "input": "a text", "reference": "no", "prediction": "yes", "right": False},
        {"row": 1, "input": "another", "reference": "yes", "prediction": "yes", "right": True},
    ],
}  # fmt: skip


def log_line(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step, "epoch": step / 4, "loss": 2.0 / step, "learning_rate": 1e-3 / step,
        "grad_norm": 1.0 + step % 2, "tokens_per_second": 100.0 + step,
        "peak_memory_bytes": 2**30, **values,
    }  # fmt: skip


LINES = [*(log_line(step) for step in (1, 2, 3, 4)), {"step": 4, "eval": RECORD["metrics"]}]


def write_run(
    directory: Path,
    *,
    method: str = "lora",
    record: dict[str, Any] | None = None,
    lines: list[Any] | None = None,
    predictions: dict[str, Any] | None = None,
    recipe: str = RECIPE,
) -> Path:
    """Write a run's files; ``record`` changes RECORD."""
    directory.mkdir(parents=True, exist_ok=True)
    text = recipe.replace("METHOD", method).replace("OUTPUT", str(directory))
    (directory / "recipe.yaml").write_text(text, encoding="utf-8")
    (directory / "run.json").write_text(json.dumps({**RECORD, **(record or {})}))
    logged = LINES if lines is None else lines
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in logged))
    if predictions is not None:
        (directory / "predictions.json").write_text(json.dumps(predictions))
    return directory


def adalora_lines() -> list[dict[str, Any]]:
    ranks = {2: [3, 3, 2, 3], 3: [3, 2, 1, 3], 4: [3, 1, 1, 3]}
    return [
        log_line(step, budget=12 - step, **({"ranks": ranks[step]} if step in ranks else {}))
        for step in (1, 2, 3, 4)
    ]


def write_sweep_files(directory: Path) -> Path:
    """Write a sweep of a completed, a failed and a pending member."""
    members = []
    for name, status in (("r=8", "completed"), ("r=1", "failed"), ("r=2", "pending")):
        error = "step 3: the loss is nan" if status == "failed" else None
        members.append({"name": name, "set": {}, "status": status, "error": error})
        folder = directory / "members" / name
        if status == "pending":
            folder.mkdir(parents=True)
            (folder / "recipe.yaml").write_text(RECIPE)
        else:
            write_run(folder, record={"exit_reason": status, "message": error})
    (directory / "sweep.json").write_text(json.dumps({"members": members}))
    return directory
