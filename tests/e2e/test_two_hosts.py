"""``lorakit train`` on two hosts, as network namespaces of this one (``scripts/two_hosts.sh``)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorakit.data.cache import CACHED_ROWS
from tests.e2e import faulty_method
from tests.e2e.processes import REPO, launch
from tests.e2e.shared_runs import LORA, STOPPED, command, recipe, wait_for
from tests.training.runs import adapter_bytes, completion_rows, learning, run_json, write_rows

SCRIPT = REPO / "scripts" / "two_hosts.sh"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the script with the Python of the tests; ``variables`` are of the environment."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        started.append(
            subprocess.Popen(
                ["bash", str(SCRIPT), *map(str, arguments)], cwd=REPO, text=True,
                env=os.environ | environment | variables,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
        return started[-1]

    check = run("--check")
    _, reason = check.communicate(timeout=60)
    if check.returncode:
        pytest.skip(reason.strip())
    yield run
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "usage: "),
        (("missing.yaml", "run"), "RECIPE = missing.yaml: no such file"),
        ((SCRIPT, "run", "0"), "N = 0: allowed: an integer above 0"),
        ((SCRIPT, "run", "--resume", "auto"), "N = --resume: allowed: an integer above 0"),
    ],
)
def test_wrong_arguments(arguments: tuple[object, ...], told: str, tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, list(tmp_path.iterdir())) == (2, "", [])
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {told}")


def test_two_hosts_equal_two_processes_of_one(
    start: Start, tiny_llama: Path, tmp_path: Path
) -> None:
    """Both hosts tokenize the rows, and store them in one cache."""
    changes = {"train__max_steps": 6, "train__epochs": None, "train__per_device_batch_size": 6}
    file = recipe(tmp_path, tiny_llama, "completion", LORA, **changes)
    write_rows(tmp_path / "data" / "train.jsonl", completion_rows(CACHED_ROWS))
    together, apart, cache = tmp_path / "together", tmp_path / "apart", tmp_path / "cache"
    hosts = start(file, apart, LORAKIT_CACHE=str(cache))
    out, err = hosts.communicate(timeout=120)
    assert hosts.returncode == 0, err
    assert out.startswith(f"{apart}/adapter: 6 steps"), out
    assert [code for code, _, _ in launch(2, *command(file, together))] == [0, 0]
    assert adapter_bytes(apart) == adapter_bytes(together)
    assert learning(apart) == learning(together)
    record = run_json(apart)
    assert record["hardware"]["processes"] == 2
    assert record["process"].startswith("host-a:")
    assert len(list((cache / "tokens").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["host-b", "host-a"])
def test_a_lost_host_ends_the_other(
    lost: str, start: Start, tiny_llama: Path, tmp_path: Path
) -> None:
    """Also if it is the one at whose address they meet."""
    file = recipe(tmp_path, tiny_llama, "completion", LORA, **STOPPED)
    hosts = start(file, tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoints" / "step-8")
    assert hosts.stderr is not None
    named = "".join(hosts.stderr.readline() for _ in range(2))
    process = re.search(rf"^{lost}, .*: process (\d+)$", named, re.MULTILINE)
    assert process, named
    os.kill(int(process[1]), signal.SIGKILL)
    began = time.monotonic()
    _, err = hosts.communicate(timeout=120)
    assert time.monotonic() - began < 60
    assert hosts.returncode > 0
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "the connection to another process is lost" in errors[0]
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.slow
def test_torchrun_starts_both_hosts_again(start: Start, tiny_llama: Path, tmp_path: Path) -> None:
    """Only the host whose process was killed counts it as a restart."""
    changes = {"train__epochs": 4, "train__save_every_steps": 4, "train__per_device_batch_size": 6}
    adapter = faulty_method.adapter(tmp_path)
    file = recipe(tmp_path, tiny_llama, "completion", adapter, **changes)
    run, whole = tmp_path / "run", tmp_path / "whole"
    fault = {"FAULT": "1:6:kill", "FAULT_ONCE": str(tmp_path / "once"), "PET_MAX_RESTARTS": "2"}
    hosts = start(file, run, **fault)
    _, err = hosts.communicate(timeout=200)
    assert hosts.returncode == 0, err
    assert err.count("restarted by the launcher: continuing as with --resume auto") == 1
    assert [code for code, _, _ in launch(2, *command(file, whole))] == [0, 0]
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert learning(run) == learning(whole)
