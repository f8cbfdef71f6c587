"""``lorakit train`` under torchrun and accelerate launch, on the CPU, as a user types it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e import faulty_method
from tests.e2e.processes import REPO, launch
from tests.e2e.shared_runs import recipe, wait_for
from tests.sweeps.files import sweep_json
from tests.training.runs import adapter_bytes, checkpoint_names, learning, run_json

#: What ``torchrun`` and ``accelerate`` run, wherever they are installed.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
ACCELERATE = (
    sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2",
)  # fmt: skip
TRAIN = ("-m", "lorakit", "train")
#: 12 steps, with a checkpoint after every fourth.
SETTINGS: dict[str, Any] = {
    "train__epochs": 4, "train__save_every_steps": 4, "train__per_device_batch_size": 6,
    "train__save_total_limit": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    adapter = faulty_method.adapter(folder)
    return recipe(folder, tiny_llama, "completion", adapter, **SETTINGS)


@pytest.fixture(scope="module")
def whole(file: Path) -> Path:
    """The uninterrupted run in two processes."""
    folder = file.parent / "whole"
    for code, _, err in launch(2, *TRAIN, file, "--output-dir", folder):
        assert code == 0, err
    return folder


def start(*command: object, **variables: object) -> subprocess.Popen[str]:
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        list(map(str, command)), env=os.environ | {k: str(v) for k, v in environment.items()},
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def errors(err: str) -> list[str]:
    """What the processes say, without the launcher's own report."""
    return [line for line in err.splitlines() if line.startswith("error: ")]


def assert_same(run: Path, whole: Path) -> None:
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert learning(run) == learning(whole)


@pytest.mark.slow
def test_torchrun_starts_again_after_a_process_was_killed(
    file: Path, whole: Path, tmp_path: Path
) -> None:
    """Without ``--resume``: a start by the same torchrun continues the run."""
    code, out, err = ended(
        start(
            *TORCHRUN, "--max-restarts", "2", *TRAIN, file, "--output-dir", tmp_path / "run",
            FAULT="1:6:kill", FAULT_ONCE=tmp_path / "once",
        )
    )  # fmt: skip
    assert code == 0, err
    lost = (
        "error: the connection to another process is lost (was it killed?); last good checkpoint: "
        f"{tmp_path / 'run' / 'checkpoints' / 'step-4'}; resume with --resume auto"
    )
    # On busy cores, torchrun may end the other process before it notices.
    assert errors(err) in ([lost], [])
    assert err.count("restarted by the launcher: continuing as with --resume auto") == 1
    assert err.count("resumed from ") == 1
    assert len(out.splitlines()) == 1
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_run_that_torchrun_did_not_start_is_refused_each_time(
    file: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "adapter")
    code, _, err = ended(start(*TORCHRUN, "--max-restarts", "1", *TRAIN, file, "--output-dir", run))
    assert code == 1
    assert len(errors(err)) == 2
    for line in errors(err):
        assert "contains a run at step-12; continue it with --resume auto, or choose" in line


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "both"])
def test_sigterm_to_torchrun_saves_one_checkpoint(
    to: str, file: Path, whole: Path, tmp_path: Path
) -> None:
    """A scheduler may send it to all processes, so that torchrun's comes second."""
    run, longer = tmp_path / "run", ("--set", "train.epochs=2000")
    process = start(*TORCHRUN, *TRAIN, file, "--output-dir", run, *longer)
    wait_for(run / "checkpoints" / "step-4")
    if to == "both":
        for child in psutil.Process(process.pid).children():
            child.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code != 0
    assert not errors(err)
    *_, last = sorted(int(name.removeprefix("step-")) for name in checkpoint_names(run))
    saved = f"interrupted at step {last} of 6000; saved {run / 'checkpoints' / f'step-{last}'}"
    assert err.splitlines().count(saved) == 1
    assert run_json(run)["exit_reason"] == "interrupted"


@pytest.mark.slow
def test_the_run_stops_if_torchrun_is_killed(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    longer = ("--set", "train.epochs=2000", "--set", "train.eval_every_steps=6000")
    process = start(*TORCHRUN, *TRAIN, file, "--output-dir", run, *longer)
    wait_for(run / "checkpoints" / "step-4")
    children = psutil.Process(process.pid).children()
    process.kill()
    assert not psutil.wait_procs(children, timeout=30)[1]
    _, _, err = ended(process)
    assert "the launcher was killed: stopping after saving a checkpoint" in err.splitlines()
    assert run_json(run)["exit_reason"] == "interrupted"


@pytest.mark.slow
def test_torchrun_continues_a_sweep_after_a_process_was_killed(file: Path, tmp_path: Path) -> None:
    grid = {"train.seed": [1, 2, 3]}
    keys = {"recipe": str(file), "output_dir": str(tmp_path / "sweep"), "grid": grid}
    (tmp_path / "sweep.yaml").write_text(json.dumps(keys))
    code, out, err = ended(
        start(
            *TORCHRUN, "--max-restarts", "1", "-m", "lorakit", "sweep", tmp_path / "sweep.yaml",
            FAULT="1:6:kill", FAULT_ONCE=tmp_path / "once",
        )
    )  # fmt: skip
    assert code == 0, err
    assert (tmp_path / "once").exists()
    assert err.count("restarted by the launcher: continuing as with --resume") == 1
    assert out.count("best: ") == 1
    assert [member["status"] for member in sweep_json(tmp_path / "sweep")["members"]] == [
        "completed"
    ] * 3


@pytest.mark.slow
def test_accelerate_with_the_configuration_for_ddp(file: Path, whole: Path, tmp_path: Path) -> None:
    code, out, err = ended(
        start(
            *ACCELERATE, "--config_file", "configs/ddp.yaml", "--main_process_port", "0", *TRAIN,
            file, "--output-dir", tmp_path / "run", "--json",
        )
    )  # fmt: skip
    assert code == 0, err
    assert len(out.splitlines()) == 1
    assert err.count("step 12/12") == 1
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_accelerate_starts_a_single_process_with_cpu(file: Path, tmp_path: Path) -> None:
    code, _, err = ended(
        start(*ACCELERATE, "--cpu", *TRAIN, file, "--output-dir", tmp_path / "run")
    )
    assert code == 0, err
    assert "warning: accelerate launch has started a single process; for several, use" in err
    assert run_json(tmp_path / "run")["hardware"]["processes"] == 1
