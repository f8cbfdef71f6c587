"""Sweeps on a local cluster of Ray."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import lorakit
from lorakit.errors import UserError
from tests.sweeps.files import sweep_json, write_sweep
from tests.training.runs import adapter_bytes

GRID = {"adapter.target_modules": [["q"], ["none"]], "train.seed": [1, 2]}


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray(still_bert: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, still_bert, "glue/sst2", grid=GRID)
    with pytest.raises(UserError, match=r"--ray needs Ray; hint: pip install 'lorakit\[ray\]'"):
        lorakit.sweep(file, ray="local")
    with pytest.raises(UserError, match="--ray needs Ray"):
        lorakit.api.plan_sweep(file, ray="local")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cluster_gives_what_one_process_gives(still_bert: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    file = write_sweep(tmp_path, still_bert, "glue/sst2", grid=GRID, joint=False)
    lorakit.sweep(file, ray="local")
    here = json.loads(file.read_text()) | {"output_dir": str(tmp_path / "here")}
    lorakit.sweep(here)
    text = json.dumps(sweep_json(tmp_path / "here")).replace(
        str(tmp_path / "here"), str(tmp_path / "out")
    )
    assert sweep_json(tmp_path / "out") == json.loads(text)
    for member in sweep_json(tmp_path / "out")["members"]:
        if member["status"] == "completed":
            runs = [tmp_path / name / "members" / member["name"] for name in ("out", "here")]
            assert adapter_bytes(runs[0]) == adapter_bytes(runs[1])


@pytest.mark.slow
def test_a_wrong_address(still_bert: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    file = write_sweep(tmp_path, still_bert, "glue/sst2", grid=GRID, joint=False)
    with pytest.raises(
        UserError, match=r"^--ray 127.0.0.1:1: .*; allowed: local, auto, or HOST:PORT"
    ):
        lorakit.sweep(file, ray="127.0.0.1:1")


@pytest.mark.slow
def test_a_signal_stops_the_tasks_with_checkpoints(still_bert: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    grid = {"train.seed": [1, 2, 3]}
    long = {"train.epochs": 3000, "train.save_every_steps": 10000}
    file = write_sweep(tmp_path, still_bert, "glue/sst2", grid=grid, set=long, joint=False)
    command = [sys.executable, "-m", "lorakit", "sweep", str(file), "--ray", "local"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    files = [tmp_path / "out" / "members" / f"seed={seed}" / "metrics.jsonl" for seed in (1, 2)]
    while not any(f.is_file() and f.stat().st_size for f in files) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert err.splitlines()[-2].startswith("interrupted; 0 of 3")
    assert list(tmp_path.glob("out/members/seed=*/checkpoints/step-*"))
    assert {m["status"] for m in sweep_json(tmp_path / "out")["members"]} == {"pending"}
