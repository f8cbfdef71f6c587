"""``lorakit train`` in several processes equals one process with all their rows."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from tests.e2e.processes import ended, launch, start
from tests.e2e.shared_runs import (
    ADALORA,
    LORA,
    STOPPED,
    TRAIN,
    assert_equal,
    command,
    recipe,
    split_over,
    train_alone,
    wait_for,
    weights,
)
from tests.training.runs import (
    adapter_bytes,
    completion_rows,
    learning,
    metrics_lines,
    run_json,
    write_rows,
)

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


@pytest.fixture(scope="module")
def trained_alone(
    tiny_llama: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The recipe of each method, which one process has trained."""
    runs = {name: (adapter, {}) for name, adapter in METHODS.items()}
    return train_alone(tmp_path_factory.mktemp("alone"), tiny_llama, tiny_bert, runs)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_method_equals_one_process(
    processes: int, trained_alone: dict[str, Path], tmp_path: Path
) -> None:
    pairs = [
        (alone, split_over(processes, alone, tmp_path / name))
        for name, alone in trained_alone.items()
    ]
    for code, _, err in launch(processes, "-c", TRAIN, *(shared for _, shared in pairs)):
        assert code == 0, err
    for alone, shared in pairs:
        assert_equal(alone, shared)
        assert run_json(shared.parent / "run")["hardware"]["processes"] == processes


VARIANTS: dict[str, dict[str, Any]] = {
    "accumulated": {"train__gradient_accumulation_steps": 2},
    "packed": {"task__packing": True},
    "new tokens": {"model__add_tokens": ["red", "<new>"]},
    "streamed": {"task__streaming": True, "train__max_steps": 5, "train__epochs": None},
    "token budget": {
        "train__max_tokens_per_batch": 200, "train__per_device_batch_size": None,
        "train__gradient_accumulation_steps": 6,
    },
    "mixture": {"task__packing": True},
    "mixture in a stream": {
        "task__streaming": True, "train__max_steps": 5, "train__epochs": None,
    },
    "best and early": {"train__early_stopping_patience": 1, "train__eval_every_steps": 1},
}  # fmt: skip


def mixed_sources(folder: Path) -> Iterator[dict[str, Any]]:
    for weight, name in enumerate(("a.jsonl", "b.jsonl"), 1):
        write_rows(folder / name, completion_rows(30)[weight:])
        yield {"path": str(folder / name), "weight": weight}


def test_other_ways_to_batch(tiny_llama: Path, tmp_path: Path) -> None:
    pairs = []
    for name, changes in VARIANTS.items():
        if name.startswith("mixture"):
            changes = changes | {"task__path": [*mixed_sources(tmp_path)]}
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


@pytest.fixture(scope="module")
def long_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 steps with dropout, in AdaLoRA's phases."""
    adapter = ADALORA | {"target_modules": ["q", "v"], "lora_dropout": 0.2, "tfinal": 0.4}
    folder = tmp_path_factory.mktemp("long")
    return recipe(folder, tiny_llama, "completion", adapter, **STOPPED)


@pytest.fixture(scope="module")
def whole(long_run: Path) -> Path:
    """The uninterrupted run in two processes."""
    folder = long_run.parent / "whole"
    assert [code for code, _, _ in launch(2, *command(long_run, folder))] == [0, 0]
    return folder


def test_a_killed_process_ends_the_others_and_the_run_resumes_exactly(
    long_run: Path, whole: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    started = start(2, *command(long_run, cut))
    wait_for(cut / "checkpoints" / "step-8")
    started[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    [(code, out, err), _] = ended(started)
    assert time.monotonic() - began < 30
    assert code == 1
    assert "error: the connection to another process is lost" in err
    assert f"last good checkpoint: {cut / 'checkpoints' / 'step-'}" in err
    assert "Traceback" not in err
    assert not (cut / "adapter").exists()
    for rank, (code, out, err) in enumerate(launch(2, *command(long_run, cut, "--resume", "auto"))):
        assert code == 0, err
        assert bool(out) == (rank == 0)
    assert adapter_bytes(cut) == adapter_bytes(whole)
    assert learning(cut) == learning(whole)


def test_a_signal_to_one_process_stops_all_at_one_step(
    long_run: Path, whole: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    started = start(2, *command(long_run, cut))
    wait_for(cut / "checkpoints" / "step-4")
    started[1].send_signal(signal.SIGTERM)
    first, second = ended(started)
    assert (first[0], second[0]) == (143, 143)
    assert "resume with --resume auto" in first[2]
    assert second[1:] == ("", "")
    # On another number of processes, the same rows are summed in another order.
    alone = json.loads(long_run.read_text())
    alone["train"] |= {"per_device_batch_size": 8, "output_dir": str(cut)}
    file = tmp_path / "alone.yaml"
    file.write_text(json.dumps(alone))
    alone["train"]["per_device_batch_size"] = 4
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(json.dumps(alone))
    record = cut / "run.json"
    for file_is_there in (True, False):  # the checkpoint says, too, how many processes wrote it
        if not file_is_there:
            record.rename(tmp_path / "run.json")
        [(code, _, err)] = launch(1, *command(wrong, cut, "--resume", "auto"))
        assert code == 2
        assert "x 2 processes, now per_device_batch_size 4 x" in err
    (tmp_path / "run.json").rename(record)
    [(code, _, err)] = launch(1, *command(file, cut, "--resume", "auto"))
    assert code == 0, err
    lines = zip(metrics_lines(cut), metrics_lines(whole), strict=True)
    assert all(one["step"] == other["step"] for one, other in lines)


def test_a_bad_row_of_a_stream_stops_all_at_one_step(tiny_llama: Path, tmp_path: Path) -> None:
    """Whichever process tokenizes it. The corrected run ends like one whose row was never bad."""
    rows: list[dict[str, Any]] = list(completion_rows(400))
    data, cut, whole = (tmp_path / name for name in ("data/train.jsonl", "cut", "whole"))
    file = recipe(
        tmp_path, tiny_llama, "completion", LORA, train__epochs=None, train__max_steps=60,
        train__per_device_batch_size=2, task__streaming=True, task__shuffle_buffer_rows=10,
    )  # fmt: skip
    for row in (250, 350):
        write_rows(data, [*rows[:row], {"prompt": "red", "completion": 3}, *rows[row + 1 :]])
        first, second = launch(2, *command(file, cut, "--resume", "auto"))
        assert (first[0], second[0]) == (2, 2)
        assert f"error: {data}, row {row + 1}: column 'completion' = 3" in first[2]
        assert f"; stopped at step 50 of 60; saved {cut}/checkpoints/step-50; " in first[2]
        assert second[1:] == ("", "")
    write_rows(data, rows)
    for folder in (cut, whole):
        ended = launch(2, *command(file, folder, "--resume", "auto"))
        assert [code for code, _, _ in ended] == [0, 0], ended
    assert adapter_bytes(cut) == adapter_bytes(whole)
    assert run_json(cut)["data"]["train"]["rows_read"] == 400


def test_an_error_is_printed_once(tiny_llama: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, tiny_llama, "completion", LORA, train__warmup_steps=1000)
    first, second = launch(2, *command(file, tmp_path / "run"))
    assert (first[0], second[0]) == (2, 2)
    assert "longer than the run" in first[2]
    assert second[1:] == ("", "")
    assert not (tmp_path / "run").exists()


#: Each process trains with its own seed.
OTHER_SEEDS = """
import os, sys, lorakit
from lorakit.api import process_group
with process_group():
    lorakit.train(lorakit.load_recipe(sys.argv[1], overrides={"train.seed": int(os.environ["RANK"])}))
"""


def test_processes_with_other_recipes_or_data_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """As on hosts that have files of their own."""
    file = recipe(tmp_path, tiny_llama, "completion", LORA)
    first, second = launch(2, "-c", OTHER_SEEDS, file)
    assert (
        first[2]
        .splitlines()[-1]
        .startswith("lorakit.errors.UserError: train.seed = 1 in process 1")
    )
    assert (second[0], second[1:]) == (2, ("", ""))
    for rank, count in enumerate((30, 31)):
        write_rows(tmp_path / f"host{rank}" / "train.jsonl", completion_rows(count))
    values = json.loads(file.read_text())
    values["task"]["path"] = f"{tmp_path}/host${{RANK:-0}}"
    file.write_text(json.dumps(values))
    first, second = launch(2, *command(file, tmp_path / "run"))
    assert (first[0], second[0]) == (2, 2)
    assert f"{tmp_path}/host1/train.jsonl: the train data of process 1 on " in first[2]
    assert second[1:] == ("", "")
    assert not (tmp_path / "run").exists()
