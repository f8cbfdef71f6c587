"""``run.json``: the model, data, hardware and outcome of a run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorakit.distributed.launcher import launch_id
from lorakit.errors import BadRow, Interrupted, WriteFailed
from lorakit.host.resources import allowed_cores
from lorakit.injection import InjectionReport
from lorakit.io.atomic import write_text, writing
from lorakit.models.load import device_memory_bytes
from lorakit.training.checkpoint import Progress
from lorakit.training.guard import OutputTaken
from lorakit.training.ranks import of_stack, rank_list

_PACKAGES = (
    "lorakit",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "bitsandbytes",
)


@dataclass
class RunRecord:
    """``method_digest`` identifies the code of a user's method, and ``chat_template_digest`` the
    tokenizer's chat template. ``seconds`` is the time of training and its evaluations over all
    resumes. ``main_metric`` is the one of ``metrics`` to report first. ``exit_reason`` is null
    during the run, then ``completed``, ``interrupted`` or
    ``failed``. ``diverged``: the loss ended above where it started, or was not finite. ``bad_row``:
    a row of a stream ended the run, or would have ended it at the next step; it can be resumed once
    the row is corrected. ``process`` is the one that writes the record, and ``launch`` identifies
    the launcher that started it. ``init_from`` is the adapter that the run started from, and a hash
    of it."""

    adapted_modules: list[dict[str, Any]]
    trainable_parameters: int
    total_parameters: int
    hardware: dict[str, Any]
    seed: int
    data: dict[str, Any]
    per_device_batch_size: int | None = None
    method_digest: str | None = None
    chat_template_digest: str | None = None
    init_from: dict[str, str] | None = None
    coverage: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=lambda: versions())
    git_commit: str | None = field(default_factory=lambda: git_commit())
    steps: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    main_metric: str | None = None
    best_step: int | None = None
    ranks: list[dict[str, Any]] | None = None
    diverged: bool = False
    exit_reason: str | None = None
    message: str | None = None
    bad_row: bool = False
    process: str = field(default_factory=lambda: process_name())
    launch: str | None = field(default_factory=lambda: launch_id())

    def write(self, path: Path) -> None:
        with writing(path):
            write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    def update(self, progress: Progress, device: torch.device) -> None:
        """Copy the progress of the run."""
        self.steps, self.trained_tokens = progress.step, progress.trained_tokens
        self.seconds = round(progress.seconds, 3)
        self.peak_memory_bytes = peak_memory_bytes(device)
        self.best_step = progress.best_step or None

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Record the ranks that the method chose for the adapted matrices, by name. Stacked ones
        have the highest of their ranks as ``r``."""
        self.ranks = rank_list(ranks)
        highest: dict[str, int] = {}
        for name, rank in ranks.items():
            highest[of_stack(name)] = max(rank, highest.get(of_stack(name), 0))
        for module in self.adapted_modules:
            module["r"] = highest[module["name"]]

    @contextmanager
    def saved_to(self, path: Path) -> Iterator[None]:
        """Write to ``path`` before and after the block, and record why the block ended.

        Raises WriteFailed, unless the block has raised an error, which is more important. Nothing
        is written over the record of another run.
        """
        self.write(path)
        try:
            yield
        except OutputTaken:
            raise
        except (Exception, KeyboardInterrupt) as error:
            stopped = isinstance(error, Interrupted | KeyboardInterrupt)
            self.exit_reason = "interrupted" if stopped else "failed"
            self.message = str(error) or type(error).__name__
            self.bad_row |= isinstance(error, BadRow)
            with suppress(WriteFailed):
                self.write(path)
            raise
        except BaseException:
            with suppress(WriteFailed):
                self.write(path)
            raise
        self.exit_reason = "completed"
        self.write(path)


def new_record(
    report: InjectionReport,
    hardware: dict[str, Any],
    seed: int,
    data: dict[str, Any],
    method_digest: str | None = None,
) -> RunRecord:
    return RunRecord(
        adapted_modules=[asdict(module) for module in report.adapted_modules],
        trainable_parameters=report.trainable_parameters,
        total_parameters=report.total_parameters,
        hardware=hardware,
        seed=seed,
        data=data,
        method_digest=method_digest,
        coverage=asdict(report.coverage) if report.coverage else None,
    )


def process_name() -> str:
    """Return ``HOST:PID:TOKEN``; the token tells apart processes of containers of the same name."""
    return f"{platform.node()}:{os.getpid()}:{secrets.token_hex(4)}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of the working directory, or None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory allocated on the GPU, or by the process if it runs on the CPU."""
    if device.type == "cuda":
        # max_memory_allocated collects and sorts a hundred other numbers too.
        found = torch.cuda.memory.memory_stats_as_nested_dict(device)
        return int(found["allocated_bytes"]["all"]["peak"]) if found else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Return the names, cores and memory of the device and the CPU."""
    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cpu_cores": allowed_cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_bytes"] = device_memory_bytes(device)
    return facts


def _cpu_name() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            names = (line.partition(":")[2].strip() for line in lines if "model name" in line)
            return next(names, platform.processor())
    except OSError:
        return platform.processor()
