"""torchrun on two GPUs: a killed process, the restart that continues the run, and a sweep."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.e2e import faulty_method
from tests.e2e.shared_runs import recipe
from tests.e2e.test_launchers import SETTINGS, TORCHRUN, TRAIN, assert_same, ended, errors, start
from tests.sweeps.files import sweep_json, write_sweep
from tests.training.runs import run_json

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

GPUS = {"CUDA_VISIBLE_DEVICES": "0,1"}


def test_torchrun_starts_again_after_a_process_was_killed(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = faulty_method.adapter(tmp_path)
    # Passes that are replayed would not call the method that kills its process.
    settings = SETTINGS | {"train__deterministic": True, "train__compile": False}
    file = recipe(tmp_path, tiny_llama, "completion", adapter, **settings)
    whole, run = tmp_path / "whole", tmp_path / "run"
    code, _, err = ended(start(*TORCHRUN, *TRAIN, file, "--output-dir", whole, **GPUS))
    assert code == 0, err
    assert run_json(whole)["hardware"]["processes"] == 2
    code, _, err = ended(
        start(
            *TORCHRUN, "--max-restarts", "2", *TRAIN, file, "--output-dir", run, **GPUS,
            FAULT="1:6:kill", FAULT_ONCE=tmp_path / "once",
        )
    )  # fmt: skip
    assert code == 0, err
    found = errors(err)
    # On busy cores, torchrun may end the other process before it notices.
    assert len(found) <= 1, found
    assert all(f"last good checkpoint: {run / 'checkpoints' / 'step-4'}" in line for line in found)
    assert "restarted by the launcher: continuing as with --resume auto" in err
    assert_same(run, whole)


def test_two_processes_share_a_sweep(tiny_llama: Path, tmp_path: Path) -> None:
    members = [{"name": "alone", "set": {"adapter.method": "full"}}]
    file = write_sweep(tmp_path, tiny_llama, grid={"adapter.r": [1, 2, 4, 8]}, members=members)
    for name, launcher in (("one", (sys.executable,)), ("two", TORCHRUN)):
        command = (*launcher, "-m", "lorakit", "sweep", file, "--output-dir", tmp_path / name)
        code, _, err = ended(start(*command, **GPUS))
        assert code == 0, err
    one, two = sweep_json(tmp_path / "one"), sweep_json(tmp_path / "two")
    for own, other in zip(two["members"], one["members"], strict=True):
        assert (own["name"], own["status"]) == (other["name"], "completed")
        assert own["metrics"] == pytest.approx(other["metrics"], rel=1e-4)
    runs = [run_json(folder) for folder in (tmp_path / "two" / "members").iterdir()]
    assert {run["hardware"]["device"] for run in runs} == {"cuda"}
    assert len({run["process"].split(":")[1] for run in runs}) == 2
