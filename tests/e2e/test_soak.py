"""Runs that are killed at random moments, again and again, end like uninterrupted ones.

``LORAKIT_SOAK_KILLS`` is the number of kills for each method and number of processes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import environments
from tests.training.processes import Ended, Launcher
from tests.training.runs import adapter_bytes, learning, write_recipe_file

KILLS = int(os.environ.get("LORAKIT_SOAK_KILLS", "2"))
SETTINGS = {
    "train__epochs": 10, "train__save_every_steps": 2, "train__log_every_steps": 3,
    "train__eval_every_steps": 9, "train__per_device_batch_size": 4,
}  # fmt: skip
_GRACE_SECONDS = 3.0
LORA = {"r": 4, "lora_dropout": 0.1}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "lora_plus": LORA,
    "adalora": {"init_r": 4, "target_r": 2, "tinit": 5, "tfinal": 10, "deltaT": 3},
    "dora": LORA,
    "intrinsic": {"d": 50},
}


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> list[Launcher]:
    return [Launcher(tmp_path_factory.mktemp(f"process-{rank}")) for rank in range(2)]


class Run:
    """``lorakit train`` in one process or several, into ``folder``."""

    def __init__(self, launchers: list[Launcher], processes: int, recipe: Path) -> None:
        self._launchers, self._processes, self._recipe = launchers, processes, recipe

    def train(self, folder: Path, kill_after: float | None = None, victim: int = 0) -> list[Ended]:
        """Train on from where the run in ``folder`` is; kill a process after some seconds, and the
        others, as a launcher does, if they do not end by themselves."""
        arguments = ["train", self._recipe, "--output-dir", folder, "--resume", "auto"]
        places = environments(self._processes) if self._processes > 1 else [{}]
        began = time.monotonic()

        def one(rank: int) -> Ended:
            if kill_after is None:
                return self._launchers[rank].run(arguments, environment=places[rank])
            due = began + kill_after + (0 if rank == victim else _GRACE_SECONDS)
            return self._launchers[rank].run(
                arguments, signal_when=lambda: time.monotonic() > due, environment=places[rank]
            )

        with ThreadPoolExecutor(self._processes) as pool:
            return list(pool.map(one, range(self._processes)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_kills_at_random_moments(
    method: str, processes: int, launchers: list[Launcher], tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = {"method": method, "target_modules": ["q", "v"]} | METHODS[method]
    file = write_recipe_file(tmp_path, tiny_llama, "completion", **SETTINGS)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"adapter": adapter}))
    run = Run(launchers, processes, file)
    began = time.monotonic()
    assert all(ended.code == 0 for ended in run.train(tmp_path / "whole"))
    usual = time.monotonic() - began
    moments, kills, number = random.Random(f"{method} {processes}"), 0, 0
    while kills < KILLS:
        folder = tmp_path / f"run-{number}"
        victim = moments.randrange(processes)
        ended = run.train(folder, moments.uniform(0.2, usual), victim)
        if ended[victim].code == -signal.SIGKILL:
            kills += 1
        else:
            assert ended[victim].code == 0, ended[victim].err
            number += 1
        for other in ended:
            assert "Traceback" not in other.err
    assert all(ended.code == 0 for ended in run.train(tmp_path / f"run-{number}"))
    for finished in range(number + 1):
        folder = tmp_path / f"run-{finished}"
        assert adapter_bytes(folder) == adapter_bytes(tmp_path / "whole")
        assert learning(folder) == learning(tmp_path / "whole")
