"""What launchers set in the environment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorakit.cli.main import run
from lorakit.distributed.build import build_strategy
from lorakit.distributed.group import rank_and_world_size
from lorakit.distributed.launcher import launch_id, warn_of_launch
from tests.training.runs import write_recipe_file

LOGS = "/tmp/torchelastic_x/none_y"


def test_processes_that_one_torchrun_starts_have_the_same_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert launch_id() is None
    names = []
    for logs in (f"{LOGS}/attempt_0/0", f"{LOGS}/attempt_1/0", f"{LOGS}z/attempt_0/0"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{logs}/error.json")
        names.append(launch_id())
    assert names == [LOGS, LOGS, f"{LOGS}z"]


def test_a_single_process_in_place_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    said: list[str] = []
    warn_of_launch(said.append)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    warn_of_launch(said.append)
    assert said == []
    monkeypatch.setenv("MASTER_PORT", "29500")
    warn_of_launch(said.append)
    assert "started a single process" in said.pop()
    monkeypatch.setenv("WORLD_SIZE", "2")
    warn_of_launch(said.append)
    assert said == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "two"),
        ("RANK", ""),
        ("RANK", "x"),
        ("LOCAL_RANK", "z"),
        ("MASTER_ADDR", ""),
        ("MASTER_PORT", "x"),
    ],
)
def test_variables_of_no_launcher(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for key, text in (right | {name: value}).items():
        monkeypatch.setenv(key, text)
    assert run(["train", "recipe.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'error: {name} = "{value}": invalid with WORLD_SIZE = ')


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("RANK", "2", "allowed with WORLD_SIZE = 2: 0 to 1"),
        ("MASTER_PORT", "65536", "allowed: 1 to 65535"),
    ],
)
def test_variables_out_of_range(
    name: str,
    value: str,
    allowed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for key, text in (right | {name: value}).items():
        monkeypatch.setenv(key, text)
    assert run(["train", "recipe.yaml"]) == 2
    assert capsys.readouterr().err == f"error: {name} = {value}: {allowed}\n"


@pytest.mark.parametrize("value", ["0", "abc"])
def test_the_number_of_processes_on_the_host(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for key, text in (right | {"LOCAL_WORLD_SIZE": value}).items():
        monkeypatch.setenv(key, text)
    assert run(["train", "recipe.yaml"]) == 2
    message = f'error: LOCAL_WORLD_SIZE = "{value}": allowed: an integer > 0\n'
    assert capsys.readouterr().err == message


def test_a_port_that_is_taken(tiny_llama: Path, tmp_path: Path) -> None:
    file = write_recipe_file(tmp_path, tiny_llama, "completion")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-m", "lorakit", "train", str(file)], capture_output=True, text=True,
            env=os.environ | variables | {"MASTER_PORT": address.partition(":")[2]},
        )  # fmt: skip
    assert done.returncode == 1
    (line,) = (x for x in done.stderr.splitlines() if x.startswith("error: "))
    assert line.startswith(f"error: MASTER_ADDR:MASTER_PORT = {address}: the processes cannot conn")
    assert "EADDRINUSE" in line


def test_a_signal_ends_a_process_that_waits_for_the_others() -> None:
    variables = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "lorakit", "train", "recipe.yaml"], env=os.environ | variables,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch_python" not in maps.read_text():
            time.sleep(0.1)
        time.sleep(4)  # until accelerate is imported
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) in (-signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_a_single_process_with_a_local_rank(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    assert not build_strategy("float32").is_sharded
    assert rank_and_world_size() == (0, 1)
