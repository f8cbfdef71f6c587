"""Runs that are trained together, compared with the same runs trained alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from lorakit.recipe.sections import Recipe
from lorakit.training.joint import train_joint
from lorakit.training.session import RunResult
from tests.families import tiny
from tests.training.runs import metrics_lines, run_json, tree, write_recipe_file

TOLERANCE = 1e-5


def members(
    folder: Path, model: Path, task: str, changes: list[dict[str, Any]], **common: Any
) -> list[Recipe]:
    """A recipe for each of ``changes``, with an output directory of its own. ``adapter`` replaces
    the whole section."""
    found = []
    for index, own in enumerate(changes):
        values = {**common, **own, "train__output_dir": str(folder / f"joint-{index}")}
        adapter = values.pop("adapter", None)
        file = write_recipe_file(folder, model, task, **values)
        if adapter is not None:
            recipe = json.loads(file.read_text())
            dotted = {k: v for k, v in values.items() if k.startswith("adapter__")}
            recipe["adapter"] = adapter | {k.partition("__")[2]: v for k, v in dotted.items()}
            file.write_text(json.dumps(recipe))
        found.append(lorakit.load_recipe(file))
    return found


def save_family(family: str, like: Path, folder: Path) -> Path:
    """Write a random model of the family with the tokenizer of ``like``."""
    shutil.copytree(like, folder)
    for file in (*folder.glob("*.safetensors"), folder / "config.json"):
        file.unlink()
    positions = {"gpt2": {"n_positions": 256}, "bloom": {}}
    changes = positions.get(family, {"max_position_embeddings": 256})
    tiny(family, vocab_size=320, **changes).save_pretrained(folder)
    return folder


def train_together(recipes: list[Recipe], **options: Any) -> list[RunResult | Exception]:
    ended: dict[int, RunResult | Exception] = {}
    options = {"resume": None, "say": lambda text: None, "finished": ended.__setitem__} | options
    results = train_joint(recipes, **options)
    if options["finished"] == ended.__setitem__:
        assert [ended[i] for i in range(len(recipes))] == results
    return results


def train_alone(recipe: Recipe) -> Path:
    """Train the same recipe by itself, into a directory beside its own."""
    folder = Path(recipe.train.output_dir).with_name(f"alone-{Path(recipe.train.output_dir).name}")
    train = recipe.train.model_copy(update={"output_dir": str(folder)})
    return lorakit.train(recipe.model_copy(update={"train": train})).output_dir


def assert_equal_training(joint: Path, alone: Path, tolerance: float = TOLERANCE) -> None:
    """Compare the adapters, and all losses and metrics."""
    ours, theirs = weights(joint), weights(alone)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance)
    lines = zip(metrics_lines(joint), metrics_lines(alone), strict=True)
    for ours_line, theirs_line in lines:
        expected, found = comparable(theirs_line), comparable(ours_line)
        assert found.pop("ranks", None) == expected.pop("ranks", None)
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


def assert_equal_runs(joint: Path, alone: Path, tolerance: float = TOLERANCE) -> None:
    """Compare everything that the two runs wrote."""
    assert_equal_training(joint, alone, tolerance)
    names = ("steps", "best_step", "exit_reason", "trained_tokens", "ranks", "diverged", "data")
    ours, theirs = run_json(joint), run_json(alone)
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert ours.keys() == theirs.keys()
    assert tree(joint).keys() == tree(alone).keys()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def comparable(line: dict[str, Any]) -> dict[str, Any]:
    """What a metrics line has that does not depend on the machine."""
    flat = {**{k: v for k, v in line.items() if k != "eval"}, **line.get("eval", {})}
    flat |= {f"rank {place}": rank for place, rank in enumerate(flat.pop("ranks", []))}
    machine = {"tokens_per_second", "peak_memory_bytes"}
    return {k: v for k, v in flat.items() if k not in machine and v is not None}


def assert_equal_to_single_runs(recipes: list[Recipe], tolerance: float = TOLERANCE) -> None:
    results = train_together(recipes)
    for recipe, result in zip(recipes, results, strict=True):
        assert isinstance(result, RunResult), result
        assert result.output_dir == Path(recipe.train.output_dir)
        alone = train_alone(recipe)
        assert_equal_runs(result.output_dir, alone, tolerance)
        assert dataclasses.asdict(result)["steps"] == run_json(alone)["steps"]
