"""A plan has the numbers of the run that it describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.errors import UserError
from tests.training.runs import recipe_for, run_json, write_recipe_file


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("completion", {}),
        ("completion", {"task__packing": True, "train__max_steps": 3, "train__epochs": None}),
        ("glue/sst2", {"train__per_device_batch_size": None, "train__max_tokens_per_batch": 256}),
    ],
)
def test_counts_equal_those_of_the_run(
    task: str, changes: dict[str, Any], tiny_llama: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    model = tiny_llama if task == "completion" else tiny_bert
    recipe = recipe_for(tmp_path, model, task, **changes)
    found = lorakit.plan(recipe).to_json()
    assert not (tmp_path / "run").exists()
    lorakit.train(recipe)
    run = run_json(tmp_path / "run")
    assert found["parameters"] == {
        "trainable": run["trainable_parameters"],
        "total": run["total_parameters"],
    }
    assert found["steps"] == run["steps"]
    assert found["tokens_per_epoch"] == run["data"]["train"]["tokens"]


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "lora_plus", "intrinsic", "full"])
def test_every_method_is_planned(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    file = write_recipe_file(tmp_path, tiny_llama, "completion")
    values = json.loads(file.read_text())
    values["adapter"] = {"method": method} | ({"target_r": 4} if method == "adalora" else {})
    file.write_text(json.dumps(values))
    recipe = lorakit.load_recipe(file)
    memory = lorakit.plan(recipe, gpu="h100").to_json()["memory_bytes"]
    assert memory["gradients"] > 0
    assert memory["peak"] > memory["weights"] + memory["optimizer"]


def test_suggestions_lower_the_peak(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_llama)
    assert lorakit.plan(recipe, gpu="h100").to_json()["suggestions"] == []
    found = lorakit.plan(recipe, device_memory="1MB").to_json()
    assert not found["fits"]
    assert found["suggestions"]
    for suggestion in found["suggestions"]:
        assert suggestion["peak_bytes"] < found["memory_bytes"]["peak"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h10"}, r"--gpu = \"h10\": unknown GPU.*h100.*allowed: l4"),
        ({"device_memory": "much"}, r"--device-memory = \"much\": allowed: a size such as"),
    ],
)
def test_unknown_devices(
    options: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        lorakit.plan(recipe_for(tmp_path, tiny_llama), **options)
