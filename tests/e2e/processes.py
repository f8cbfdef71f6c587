"""Start several processes of one command, as a launcher does."""

from __future__ import annotations

import signal
import socket
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.training.processes import Forked

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


@cache
def _streams() -> tempfile.TemporaryDirectory[str]:
    """The files that processes print to; deleted at exit."""
    return tempfile.TemporaryDirectory(prefix="lorakit-processes-")


def start(
    processes: int,
    *command: object,
    faults: Mapping[int, Mapping[str, Any]] | None = None,
    **variables: str,
) -> list[Forked]:
    """``python COMMAND``, which is ``-c CODE`` or ``-m lorakit`` with arguments, in each process,
    on the CPU; ``variables`` are of the environment. ``faults`` are what ``Launcher.run`` describes,
    by rank."""
    folder = Path(tempfile.mkdtemp(dir=_streams().name))
    started = []
    for rank, environment in enumerate(environments(processes)):
        fault = {"signal": signal.SIGKILL} | dict((faults or {}).get(rank, {}))
        own = {**environment, **variables, **fault.pop("environment", {})}
        request = {"command": list(map(str, command)), "environment": own, **fault}
        started.append(Forked(folder / f"stdout-{rank}", folder / f"stderr-{rank}", **request))
    return started


def ended(started: list[Forked], seconds: float = 240) -> list[tuple[int, str, str]]:
    """The exit code, stdout and stderr of each process."""
    found = [process.wait(seconds) for process in started]
    return [(each.code, each.out, each.err) for each in found]


def launch(
    processes: int,
    *command: object,
    faults: Mapping[int, Mapping[str, Any]] | None = None,
    **variables: str,
) -> list[tuple[int, str, str]]:
    return ended(start(processes, *command, faults=faults, **variables))
