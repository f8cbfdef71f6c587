"""Start several processes of one command, as a launcher does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def environments(processes: int) -> list[dict[str, str]]:
    """What a launcher sets for each of the processes of one host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    return [
        {key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        for rank in range(processes)
    ]


def start(processes: int, *arguments: object, **variables: str) -> list[subprocess.Popen[str]]:
    """``python ARGUMENTS`` in each process, on the CPU; ``variables`` are of the environment."""
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], env={**os.environ, **environment, **variables},
            cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for environment in environments(processes)
    ]  # fmt: skip


def ended(started: list[subprocess.Popen[str]], seconds: float = 240) -> list[tuple[int, str, str]]:
    """The exit code, stdout and stderr of each process."""
    said = [process.communicate(timeout=seconds) for process in started]
    return [(process.returncode, *each) for process, each in zip(started, said, strict=True)]


def launch(processes: int, *arguments: object, **variables: str) -> list[tuple[int, str, str]]:
    return ended(start(processes, *arguments, **variables))
