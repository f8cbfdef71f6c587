"""A plan has the numbers of the run that it describes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.cli.main import run
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
    record = run_json(tmp_path / "run")
    assert found["parameters"] == {
        "trainable": record["trainable_parameters"],
        "total": record["total_parameters"],
    }
    assert found["steps"] == record["steps"]
    assert found["tokens_per_epoch"] == record["data"]["train"]["tokens"]


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
    notes: list[str] = []
    found = lorakit.plan(recipe, device_memory="1MB", say=notes.append).to_json()
    assert not found["fits"]
    assert notes[-1] == "the run does not fit: planning it with other settings"
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


def test_a_model_without_weights_and_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_llama / "config.json", bare)
    recipe = recipe_for(tmp_path, bare, task__max_length=64)
    notes: list[str] = []
    found = lorakit.plan(recipe, gpu="h100", say=notes.append)
    assert found.step.batches.largest.input_ids.shape == (8, 64)
    assert (found.step.steps, found.step.batches.tokens_per_epoch) == (None, None)
    assert found.seconds is None
    [note] = [note for note in notes if "no tokenizer" in note]
    assert note.endswith("assuming rows of 64 tokens, the most that task.max_length allows")


def test_a_large_model_takes_time(tiny_llama: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.mkdir()
    config = json.loads((tiny_llama / "config.json").read_text())
    (large / "config.json").write_text(json.dumps(config | {"vocab_size": 2**25}))
    notes: list[str] = []
    lorakit.plan(recipe_for(tmp_path, large, task__max_length=8), gpu="h100", say=notes.append)
    assert notes.count("planning a step without loading weights; this can take a minute") == 1


def test_auto_is_the_largest_batch_that_fits(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_llama, train__per_device_batch_size=4)
    step = lorakit.plan(recipe, gpu="h100").step
    assert step.mode == "cuda_graphs"  # as in a run, whose trials may take half of the memory then
    peak = step.memory.peak
    auto = recipe_for(tmp_path, tiny_llama, train__per_device_batch_size="auto")
    notes: list[str] = []
    found = lorakit.plan(auto, device_memory=int(2 * peak / 0.95) + 1000, say=notes.append)
    assert found.step.memory.peak == peak
    assert "train.per_device_batch_size = 4: the largest expected to fit" in notes


def test_factors_cast_for_cuda_graphs_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    eager, graphs = (
        lorakit.plan(
            recipe_for(tmp_path, tiny_llama, model__dtype="bfloat16", train__compile=compiles),
            gpu="h100",
        ).step
        for compiles in (False, "auto")
    )
    assert (eager.mode, graphs.mode) == ("eager", "cuda_graphs")
    # 4 bytes for each value of a factor in float32, and 2 for its copy.
    assert graphs.memory.adapter == eager.memory.adapter * 3 / 2


def test_measured_steps(tiny_llama: Path, tmp_path: Path) -> None:
    found = lorakit.plan(recipe_for(tmp_path, tiny_llama), measure=True)
    assert found.measured is not None
    assert found.step.steps == found.measured.first_steps + found.measured.steps == 8
    assert found.seconds is not None
    assert found.seconds > found.measured.first_seconds > 0
    assert not (tmp_path / "run").exists()


def test_the_command(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_recipe_file(tmp_path, tiny_llama, "completion"))
    assert run(["plan", file, "--gpu", "H100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["memory_bytes"]) == {
        "weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace", "peak",
    }  # fmt: skip
    assert found["fits"] is True
    assert run(["plan", file, "--device-memory", "1MiB"]) == 0
    out = capsys.readouterr().out
    assert "does not fit into 1 MiB" in out
    assert "train.gradient_checkpointing=true" in out
    assert run(["plan", file, "--measure", "--gpu", "h100"]) == 2
    assert "--measure and --gpu are mutually exclusive" in capsys.readouterr().err
