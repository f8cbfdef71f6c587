"""Small training runs: rows of many lengths, a recipe, and readers for the results."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import lorakit
from lorakit.recipe.sections import Recipe

WORDS = "red green blue one two three four five six seven eight nine ten".split()  # noqa: SIM905
#: What a metrics line says of the machine and not of the training.
MACHINE_KEYS = {"tokens_per_second", "peak_memory_bytes"}


def completion_rows(count: int) -> list[dict[str, str]]:
    return [
        {
            "prompt": " ".join(WORDS[: i % 9 + 1]),
            "completion": " " + " ".join(WORDS[i % 5 : i % 7 + 6]),
        }
        for i in range(count)
    ]


def class_rows(count: int) -> list[dict[str, Any]]:
    return [{"sentence": " ".join(WORDS[i % 4 : i % 9 + 4]), "label": i % 2} for i in range(count)]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_recipe_file(folder: Path, model: Path, task: str, **changes: Any) -> Path:
    """Write ``folder/recipe.yaml`` and, unless they exist, the data. The run is exact: float32, no
    dropout. ``changes`` use ``__`` for the dot of a key."""
    data = folder / "data"
    if not data.exists():
        rows = completion_rows if task == "completion" else class_rows
        write_rows(data / "train.jsonl", rows(30))
        write_rows(data / "validation.jsonl", rows(8))
    recipe: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "adapter": {"r": 4, "target_modules": ["q", "v"]},
        "task": {"name": task, "path": str(data), "max_length": 128},
        "train": {
            "output_dir": str(folder / "run"),
            "epochs": 2,
            "per_device_batch_size": 8,
            "learning_rate": 1e-2,
            "log_every_steps": 1,
            "seed": 7,
        },
    }
    if task == "completion":  # what these runs are compared by is the loss
        recipe["task"]["eval_generate"] = "never"
    for key, value in changes.items():
        section, _, name = key.partition("__")
        recipe[section][name] = value
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return file


def recipe_for(folder: Path, model: Path, task: str = "completion", **changes: Any) -> Recipe:
    return lorakit.load_recipe(write_recipe_file(folder, model, task, **changes))


def without_dropout(bert: Path, folder: Path) -> Path:
    """Write the same model with a configuration without dropout."""
    still = folder / "still-bert"
    shutil.copytree(bert, still)
    config = json.loads((still / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    return still


def metrics_lines(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def log_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_lines(run) if "loss" in line]


def eval_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_lines(run) if "eval" in line]


def learning(run: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without machine-dependent values."""
    return [{k: v for k, v in x.items() if k not in MACHINE_KEYS} for x in metrics_lines(run)]


def run_json(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def checkpoint_names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return every file and its contents; equal trees mean that nothing was written."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """Return a recipe with changed values, as if its file contained them."""
    values = copy.deepcopy(recipe.resolved())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    sections = {n: getattr(recipe, n).model_validate(values[n]) for n in values}
    return Recipe(**sections)
