"""Recipes for data files, and commands that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli.main import run


def recipe_file(model: Path, path: Any, name: str = "recipe.yaml", **task: Any) -> str:
    keys = {"name": "completion", "path": path, "max_length": 96, "eval_generate": "never", **task}
    recipe = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "adapter": {"r": 2, "target_modules": ["q", "v"]},
        "task": keys,
        "train": {"output_dir": f"run-{name}", "max_steps": 2, "per_device_batch_size": 2},
    }
    Path(name).write_text(json.dumps(recipe))
    return name


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def previewed(capsys: pytest.CaptureFixture[str], recipe: str, *more: str) -> tuple[Any, str]:
    code, out, err = command(capsys, "preview", recipe, "--count", "9", "--json", *more)
    assert code == 0, err
    return json.loads(out), err


def texts(preview: Any) -> list[str]:
    return [row["text"] for row in preview["examples"]]
