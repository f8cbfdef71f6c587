"""Checkpoints: all that an exact resume needs, whole or absent.

A checkpoint is written beside and renamed. It holds what trains, the optimizer's tensors, the
random states and the best model's weights as safetensors, the rest as JSON: there is no pickle in
it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.errors import UserError
from lorakit.io.atomic import atomic_directory, remove_directory, remove_leftovers
from lorakit.training.checks import LossHistory

_NAME = re.compile(r"step-(\d+)")

#: Torch's generators as tensors; Python's and NumPy's as JSON.
RandomStates = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass
class Progress:
    """Where a run stands. ``step`` counts finished optimizer steps; ``window`` holds the loss, the
    gradient norm and the method's values of each step since the last log line; ``metrics_lines``
    are those that metrics.jsonl had; ``first_loss`` is the first line's, and ``said_grown`` whether
    the user knows that it grew far above that. ``history`` is what the end is judged by."""

    step: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    last_eval_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    window: list[list[float]] = field(default_factory=list)
    metrics_lines: int = 0
    first_loss: float | None = None
    said_grown: bool = False
    history: LossHistory = field(default_factory=LossHistory)


@dataclass
class Snapshot:
    """A checkpoint in memory. ``method`` is what the method keeps besides its weights, ``best`` the
    best model's weights, if there is one."""

    progress: Progress
    weights: dict[str, Tensor]
    method: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    best: dict[str, Tensor] | None
    random: RandomStates

    def fits(self, weights: Mapping[str, Tensor], method: Mapping[str, Tensor]) -> bool:
        """Whether it is of a run that trains ``weights``, with a method that keeps ``method``."""
        stored = [self.weights, *([self.best] if self.best is not None else [])]
        known = set(range(len(weights)))
        return (
            all(_shapes(tensors) == _shapes(weights) for tensors in stored)
            and _shapes(self.method) == _shapes(method)
            and set(self.optimizer["state"]) <= known  # what got no gradient has none
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def save_checkpoint(folder: Path, snapshot: Snapshot, keep: int | None) -> Path:
    """Write ``folder/step-N`` and drop all but the newest ``keep``, and what a kill left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{snapshot.progress.step}"
    remove_leftovers(folder)
    if not final.exists():
        with atomic_directory(final, replace=False) as beside:
            _write(beside, snapshot)
    for old in checkpoints(folder)[: -keep if keep else 0]:
        remove_directory(old)
    return final


def _write(beside: Path, snapshot: Snapshot) -> None:
    tensors, plain = _split_tensors(snapshot.optimizer)
    save_file(_cpu(snapshot.weights), beside / "weights.safetensors", {"format": "pt"})
    save_file(_cpu(snapshot.method), beside / "method.safetensors", {"format": "pt"})
    save_file(tensors, beside / "optimizer.safetensors", {"format": "pt"})
    if snapshot.best is not None:
        save_file(_cpu(snapshot.best), beside / "best.safetensors", {"format": "pt"})
    random_tensors, random_plain = snapshot.random
    save_file(random_tensors, beside / "random.safetensors", {"format": "pt"})
    state = {
        "progress": asdict(snapshot.progress),
        "optimizer": plain,
        "scheduler": snapshot.scheduler,
        "scaler": snapshot.scaler,
        "random": random_plain,
    }
    (beside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")


def load_checkpoint(checkpoint: Path) -> Snapshot:
    """Raises UserError if the directory is no checkpoint."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(checkpoint / "optimizer.safetensors")
        best = checkpoint / "best.safetensors"
        return Snapshot(
            progress=_progress(state["progress"]),
            weights=load_file(checkpoint / "weights.safetensors"),
            method=load_file(checkpoint / "method.safetensors"),
            optimizer=_join_tensors(tensors, state["optimizer"]),
            scheduler=state["scheduler"],
            scaler=state["scaler"],
            best=load_file(best) if best.is_file() else None,
            random=(load_file(checkpoint / "random.safetensors"), state["random"]),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"--resume: {checkpoint}: not a whole checkpoint: {error}") from error


def _progress(stored: dict[str, Any]) -> Progress:
    return Progress(**{**stored, "history": LossHistory(**stored.get("history", {}))})


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def drop_after(folder: Path, step: int) -> None:
    """A run that goes back to ``step`` forgets its later checkpoints."""
    for later in checkpoints(folder):
        if _step(later) > step:
            remove_directory(later)


def random_states() -> RandomStates:
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return tensors, {"python": [version, list(numbers), gauss], "numpy": numpy_state}


def restore_random_states(states: RandomStates) -> None:
    tensors, plain = states
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy_state = plain["numpy"]
    numpy_state["state"]["key"] = np.asarray(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _split_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state dict as tensors named ``INDEX.KEY`` and the rest."""
    tensors = {
        f"{index}.{key}": value.detach().cpu().contiguous()
        for index, values in state["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    plain = {
        str(index): {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        for index, values in state["state"].items()
    }
    return tensors, {"state": plain, "param_groups": state["param_groups"]}


def _join_tensors(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state = {int(index): dict(values) for index, values in plain["state"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state[int(index)][key] = tensor
    return {"state": state, "param_groups": plain["param_groups"]}
