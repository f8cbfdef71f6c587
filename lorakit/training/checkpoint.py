"""Checkpoints: everything that an exact resume needs.

A checkpoint directory is written under a temporary name, then renamed atomically, so it is
complete or absent. It contains the engine's state, the random states and the best model's weights:
tensors as safetensors, the rest as JSON. Nothing is pickled.
"""

from __future__ import annotations

import json
import random
import re
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
from lorakit.training.divergence import LossHistory
from lorakit.training.engine import EngineState

_NAME = re.compile(r"step-(\d+)")

#: torch's generators as tensors; Python's and NumPy's as JSON.
RandomStates = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass
class Progress:
    """The progress of a run.

    ``step`` counts finished optimizer steps, ``seconds`` is the time spent in steps and
    evaluations. ``window`` has the loss, gradient norm and method values of each step since the
    last log line, ``metrics_lines`` is the length of metrics.jsonl. ``first_loss`` is the loss of
    the first log line, and ``said_grown`` tells whether a warning about its growth was printed.
    ``history`` shows at the end whether the run has diverged.
    """

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
    """A checkpoint in memory; ``best`` are the best model's weights, None before an evaluation."""

    progress: Progress
    engine: EngineState
    best: dict[str, Tensor] | None
    random: RandomStates


def save_checkpoint(folder: Path, snapshot: Snapshot, keep: int | None) -> Path:
    """Write ``folder/step-N``, delete all but the newest ``keep`` checkpoints and whatever a killed
    process left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{snapshot.progress.step}"
    remove_leftovers(folder)
    if not final.exists():
        with atomic_directory(final, replace=False) as temporary:
            _write(temporary, snapshot)
    for old in checkpoints(folder)[: -keep if keep else 0]:
        remove_directory(old)
    return final


def _write(directory: Path, snapshot: Snapshot) -> None:
    engine = snapshot.engine
    random_tensors, random_json = snapshot.random
    optimizer_tensors, optimizer_json = _split_tensors(engine.optimizer)
    files = {
        "weights": _on_host(engine.weights),
        "method": _on_host(engine.method),
        "optimizer": optimizer_tensors,
        "random": random_tensors,
    }
    if snapshot.best is not None:
        files["best"] = _on_host(snapshot.best)
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors", {"format": "pt"})
    state = {
        "progress": asdict(snapshot.progress),
        "optimizer": optimizer_json,
        "scheduler": engine.scheduler,
        "scaler": engine.scaler,
        "random": random_json,
    }
    (directory / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")


def load_checkpoint(checkpoint: Path) -> Snapshot:
    """Read a checkpoint; raises UserError if it is not complete."""

    def load(name: str) -> dict[str, Tensor]:
        return load_file(checkpoint / f"{name}.safetensors")

    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        progress = _progress(state["progress"])
        engine = EngineState(
            step=progress.step,
            weights=load("weights"),
            method=load("method"),
            optimizer=_join_tensors(load("optimizer"), state["optimizer"]),
            scheduler=state["scheduler"],
            scaler=state["scaler"],
        )
        best = load("best") if (checkpoint / "best.safetensors").is_file() else None
        return Snapshot(progress, engine, best, random=(load("random"), state["random"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"--resume: {checkpoint}: incomplete checkpoint: {error}") from error


def _progress(stored: dict[str, Any]) -> Progress:
    return Progress(**{**stored, "history": LossHistory(**stored.get("history", {}))})


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def delete_after(folder: Path, step: int) -> None:
    """Delete the checkpoints after ``step``, from which a run resumes."""
    for later in checkpoints(folder):
        if _step(later) > step:
            remove_directory(later)


def random_states() -> RandomStates:
    """Return the states of the random number generators of torch, Python and NumPy."""
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


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _split_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state dict into tensors named ``INDEX.KEY``, and the rest."""
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
