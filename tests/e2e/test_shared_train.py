"""``lorakit train`` in several processes equals one process with all their rows."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from tests.e2e.processes import ended, launch, start
from tests.training.runs import (
    adapter_bytes,
    learning,
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
METHODS = {
    "lora": LORA | {"bias": "all"},
    "lora_plus": LORA | {"method": "lora_plus"},
    "adalora": ADALORA | {"target_modules": ["q", "v"]},
    "dora": LORA | {"method": "dora"},
    "moslora": LORA | {"method": "moslora"},
    "intrinsic": {"method": "intrinsic", "d": 50, "target_modules": ["q", "v"]},
    "full": {"method": "full"},
    "bitfit": {"method": "bitfit"},
}


def recipe(folder: Path, model: Path, task: str, adapter: dict[str, Any], **changes: Any) -> Path:
    """A recipe whose steps have 12 rows, the last one of an epoch 6."""
    folder.mkdir(parents=True, exist_ok=True)
    changes = {"train__per_device_batch_size": 12} | changes
    file = write_recipe_file(folder, model, task, **changes)
    values = json.loads(file.read_text())
    values["adapter"] = adapter
    file.write_text(json.dumps(values))
    return file


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


@pytest.mark.parametrize("processes", [2, 3])
def test_every_method_equals_one_process(
    processes: int, tiny_llama: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    pairs, bert = [], without_dropout(tiny_bert, tmp_path)
    for name, adapter in METHODS.items():
        model, task = (bert, "glue/sst2") if name == "bitfit" else (tiny_llama, "completion")
        alone = recipe(tmp_path / name, model, task, adapter)
        lorakit.train(lorakit.load_recipe(alone))
        pairs.append((alone, split_over(processes, alone, tmp_path / f"{name}-shared")))
    for code, _, err in launch(processes, "-c", TRAIN, *(shared for _, shared in pairs)):
        assert code == 0, err
    for alone, shared in pairs:
        wanted, found = weights(alone.parent), weights(shared.parent)
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0, msg=f"{alone}: {key}")
        runs = alone.parent / "run", shared.parent / "run"
        for one, other in zip(*map(log_lines, runs), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], abs=1e-4)
        for key in ("steps", "trained_tokens", "ranks"):
            assert run_json(runs[0])[key] == run_json(runs[1])[key]
        assert run_json(runs[1])["hardware"]["processes"] == processes


VARIANTS: dict[str, dict[str, Any]] = {
    "accumulated": {"train__gradient_accumulation_steps": 2},
    "packed": {"task__packing": True},
    "streamed": {"task__streaming": True, "train__max_steps": 5, "train__epochs": None},
    "token budget": {
        "train__max_tokens_per_batch": 200, "train__per_device_batch_size": None,
        "train__gradient_accumulation_steps": 6,
    },
    "best and early": {"train__early_stopping_patience": 1, "train__eval_every_steps": 1},
}  # fmt: skip


def test_other_ways_to_batch(tiny_llama: Path, tmp_path: Path) -> None:
    pairs = []
    for name, changes in VARIANTS.items():
        alone = recipe(tmp_path / name, tiny_llama, "completion", LORA, **changes)
        lorakit.train(lorakit.load_recipe(alone))
        shared = split_over(2, alone, tmp_path / f"{name}-shared")
        if name == "token budget":
            values = json.loads(shared.read_text())
            values["train"] |= {"per_device_batch_size": None, "gradient_accumulation_steps": 3}
            shared.write_text(json.dumps(values))
        pairs.append((alone, shared))
    for code, _, err in launch(2, "-c", TRAIN, *(shared for _, shared in pairs)):
        assert code == 0, err
    for alone, shared in pairs:
        found = weights(shared.parent)
        for key, value in weights(alone.parent).items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0, msg=f"{alone}: {key}")
        one, other = (run_json(file.parent / "run") for file in (alone, shared))
        for key in ("steps", "trained_tokens", "best_step"):
            assert one[key] == other[key]


STOPPED = {
    "train__epochs": 20, "train__save_every_steps": 4, "train__log_every_steps": 2,
    "train__per_device_batch_size": 4, "train__gradient_accumulation_steps": 3,
}  # fmt: skip


@pytest.fixture
def long_run(tiny_llama: Path, tmp_path: Path) -> Path:
    """60 steps in three processes with dropout, in AdaLoRA's phases."""
    adapter = ADALORA | {"target_modules": ["q", "v"], "lora_dropout": 0.2, "tfinal": 0.4}
    folder = tmp_path / "long"
    return recipe(folder, tiny_llama, "completion", adapter, **STOPPED)


def command(file: Path, folder: Path, *more: object) -> list[object]:
    return ["-m", "lorakit", "train", file, "--output-dir", folder, *more]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


def test_a_killed_process_ends_the_others_and_the_run_resumes_exactly(
    long_run: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert [code for code, _, _ in launch(2, *command(long_run, whole))] == [0, 0]
    started = start(2, *command(long_run, cut))
    wait_for(cut / "checkpoints" / "step-8")
    started[1].kill()
    began = time.monotonic()
    [(code, out, err), _] = ended(started)
    assert time.monotonic() - began < 30
    assert code == 1
    assert "error: the connection to another process is lost" in err
    assert "Traceback" not in err
    assert not (cut / "adapter").exists()
    for rank, (code, out, err) in enumerate(launch(2, *command(long_run, cut, "--resume", "auto"))):
        assert code == 0, err
        assert bool(out) == (rank == 0)
    assert adapter_bytes(cut) == adapter_bytes(whole)
    assert learning(cut) == learning(whole)


def test_a_signal_to_one_process_stops_all_at_one_step(long_run: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert [code for code, _, _ in launch(2, *command(long_run, whole))] == [0, 0]
    started = start(2, *command(long_run, cut))
    wait_for(cut / "checkpoints" / "step-4")
    started[1].send_signal(signal.SIGTERM)
    first, second = ended(started)
    assert (first[0], second[0]) == (143, 143)
    assert "continue with --resume auto" in first[2]
    assert second[1:] == ("", "")
    # On another number of processes, the same rows are summed in another order.
    alone = json.loads(long_run.read_text())
    alone["train"] |= {"per_device_batch_size": 8, "output_dir": str(cut)}
    file = tmp_path / "alone.yaml"
    file.write_text(json.dumps(alone))
    alone["train"]["per_device_batch_size"] = 4
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(json.dumps(alone))
    [(code, _, err)] = launch(1, *command(wrong, cut, "--resume", "auto"))
    assert code == 2
    assert "x 2 processes, now per_device_batch_size 4 x" in err
    [(code, _, err)] = launch(1, *command(file, cut, "--resume", "auto"))
    assert code == 0, err
    lines = zip(metrics_lines(cut), metrics_lines(whole), strict=True)
    assert all(one["step"] == other["step"] for one, other in lines)


def test_an_error_is_printed_once(tiny_llama: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, tiny_llama, "completion", LORA, train__warmup_steps=1000)
    first, second = launch(2, *command(file, tmp_path / "run"))
    assert (first[0], second[0]) == (2, 2)
    assert "longer than the run" in first[2]
    assert second[1:] == ("", "")
    assert not (tmp_path / "run").exists()
