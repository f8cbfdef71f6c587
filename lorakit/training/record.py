"""``run.json``: what was run, on what, and what came of it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorakit.injection import InjectionReport

_PACKAGES = ("lorakit", "torch", "transformers", "accelerate", "datasets", "safetensors")


@dataclass
class RunRecord:
    """``seconds`` are those of training and its evaluations, over all resumes; ``exit_reason`` is
    null while the run goes on. ``diverged`` says that the loss ended above its start, or was not
    finite; ``bad_row`` that a row of a stream ended the run, which may be resumed once the row is
    corrected."""

    adapted_modules: list[dict[str, Any]]
    trainable_parameters: int
    total_parameters: int
    hardware: dict[str, Any]
    seed: int
    data: dict[str, Any]
    coverage: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=lambda: versions())
    git_commit: str | None = field(default_factory=lambda: git_commit())
    steps: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    ranks: list[dict[str, Any]] | None = None
    diverged: bool = False
    exit_reason: str | None = None
    message: str | None = None
    bad_row: bool = False

    def write(self, path: Path) -> None:
        """Written beside and renamed."""
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        beside.replace(path)


def new_record(
    report: InjectionReport, hardware: dict[str, Any], seed: int, data: dict[str, Any]
) -> RunRecord:
    return RunRecord(
        adapted_modules=[asdict(module) for module in report.adapted_modules],
        trainable_parameters=report.trainable_parameters,
        total_parameters=report.total_parameters,
        hardware=hardware,
        seed=seed,
        data=data,
        coverage=asdict(report.coverage) if report.coverage else None,
    )


def versions() -> dict[str, str]:
    """Versions of Python and of what decides the numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the working directory, None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
