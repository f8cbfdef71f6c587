"""Sweeps of small runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.training.runs import write_recipe_file


def write_sweep(folder: Path, model: Path, task: str = "completion", **keys: Any) -> Path:
    """Write ``folder/sweep.yaml`` over ``folder/recipe.yaml``, with rows and 4 steps a run."""
    recipe = write_recipe_file(folder, model, task, train__epochs=1)
    sweep = {"recipe": str(recipe), "output_dir": str(folder / "out"), **keys}
    file = folder / "sweep.yaml"
    file.write_text(json.dumps(sweep), encoding="utf-8")
    return file


def sweep_json(folder: Path, timed: bool = False) -> dict[str, Any]:
    """Return sweep.json, unless ``timed`` without times."""
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    if not timed:
        for member in found["members"]:
            member.pop("seconds")
    return found
