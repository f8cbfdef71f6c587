"""Checkpoints: everything that an exact resume needs.

A checkpoint directory is written under a temporary name, then renamed atomically, so it is
complete or absent. It contains the engine's state, the random states and the best model's weights.
What is read is checked before it is used: files (``checkpoint_files``), types and numbers here,
names and shapes by the engine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from lorakit.errors import UserError, shown
from lorakit.io.atomic import atomic_directory, remove_leftovers, remove_path, writing
from lorakit.notes import Say
from lorakit.training.checkpoint_files import read_files, write_files
from lorakit.training.divergence import LossHistory, nonfinite_weight
from lorakit.training.engine import EngineState
from lorakit.training.random_states import RandomStates, check_random_states

_NAME = re.compile(r"step-(0|[1-9][0-9]{0,15})")
_KNOWN_KEYS = ConfigDict(extra="forbid")
_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 53)]
_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Float = Annotated[float, Field(strict=True)]
_Bool = Annotated[bool, Field(strict=True)]


@dataclass
class Progress:
    """The progress of a run.

    ``step`` counts finished optimizer steps, ``seconds`` is the time spent in steps and
    evaluations. ``window`` has the loss, gradient norm and method values of each step since the
    last log line, ``metrics_lines`` is the length of metrics.jsonl. ``first_loss`` is the loss of
    the first log line, and ``warned_of_growth`` tells whether a warning about its growth was
    printed. ``history`` shows at the end whether the run has diverged.
    """

    __pydantic_config__: ClassVar = _KNOWN_KEYS

    step: _Count = 0
    trained_tokens: _Count = 0
    seconds: _Finite = 0.0
    last_eval_step: _Count = 0
    best_metrics: dict[str, _Finite] = field(default_factory=dict)
    best_step: _Count = 0
    evaluations_without_gain: _Count = 0
    stopped_early: _Bool = False
    window: list[list[_Float]] = field(default_factory=list)
    metrics_lines: _Count = 0
    first_loss: _Finite | None = None
    warned_of_growth: _Bool = False
    history: LossHistory = field(default_factory=LossHistory)


@dataclass
class Snapshot:
    """A checkpoint in memory; ``best`` are the best model's weights, None before an evaluation.
    ``random`` has the random states of each process."""

    progress: Progress
    engine: EngineState
    best: dict[str, Tensor] | None
    random: list[RandomStates]


def save_checkpoint(folder: Path, snapshot: Snapshot, keep: int | None) -> Path:
    """Write ``folder/step-N``, delete all but the newest ``keep`` checkpoints and whatever a killed
    process left behind. Raises WriteFailed."""
    final = folder / f"step-{snapshot.progress.step}"
    with writing(final):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        if not final.exists():
            with atomic_directory(final, replace=False) as temporary:
                _write(temporary, snapshot)
        for old in checkpoints(folder)[: -keep if keep else 0]:
            remove_path(old)
    return final


def _write(directory: Path, snapshot: Snapshot) -> None:
    engine = snapshot.engine
    optimizer_tensors, optimizer_json = _split_tensors(engine.optimizer)
    files = {
        "weights": _on_host(engine.weights),
        "method": _on_host(engine.method),
        "optimizer": optimizer_tensors,
        "random": {
            _of_process(rank, name): tensor
            for rank, (tensors, _) in enumerate(snapshot.random)
            for name, tensor in tensors.items()
        },
    }
    if snapshot.best is not None:
        files["best"] = _on_host(snapshot.best)
    state = {
        "progress": asdict(snapshot.progress),
        "optimizer": optimizer_json,
        "scheduler": engine.scheduler,
        "scaler": engine.scaler,
        "random": [plain for _, plain in snapshot.random],
    }
    write_files(directory, files, state)


@dataclass
class _State:
    """The contents of state.json; ``version`` is that of ``checkpoint_files``."""

    __pydantic_config__: ClassVar = _KNOWN_KEYS

    progress: Progress
    optimizer: _OptimizerState
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    random: list[_PlainRandomStates] | _PlainRandomStates  # one process, earlier versions
    version: int = 1


@dataclass
class _OptimizerState:
    """What is left of an optimizer's state dict without its tensors."""

    __pydantic_config__: ClassVar = _KNOWN_KEYS

    state: dict[str, dict[str, Any]]
    param_groups: list[dict[str, Any]]


@dataclass
class _PlainRandomStates:
    __pydantic_config__: ClassVar = _KNOWN_KEYS

    python: list[Any]
    numpy: dict[str, Any]


def load_checkpoint(checkpoint: Path) -> Snapshot:
    """Read a checkpoint; raises UserError if it is corrupt or not complete."""
    try:
        tensors, stored = read_files(checkpoint)
        state = _parsed_state(stored)
        progress = state.progress
        if (name := _NAME.fullmatch(checkpoint.name)) and int(name[1]) != progress.step:
            raise ValueError(f"state.json: the checkpoint of step {progress.step}")
        for part in ("weights", "best"):
            if tensors.get(part) and (bad := nonfinite_weight(tensors[part])):
                raise ValueError(f"{part}.safetensors: {bad} is not finite")
        engine = EngineState(
            step=progress.step,
            weights=tensors["weights"],
            method=tensors["method"],
            optimizer=_join_tensors(tensors["optimizer"], state.optimizer),
            scheduler=state.scheduler,
            scaler=state.scaler,
        )
        states = _random_states_of(tensors["random"], state.random)
        return Snapshot(progress, engine, tensors.get("best"), states)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint}: corrupt or incomplete checkpoint: {error}", about="--resume"
        ) from error


def _parsed_state(stored: dict[str, Any]) -> _State:
    """Raises ValueError, which names the first wrong key."""
    try:
        state = TypeAdapter(_State).validate_python(stored)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"state.json: {key}: {first['msg'].lower()}") from error
    history = state.progress.history
    losses = [*history.last, *(row[0] for row in state.progress.window if row)]
    if not all(map(math.isfinite, losses)) or math.isnan(history.peak):
        raise ValueError("state.json: progress: a loss is not finite")
    if history.start is not None and not history.last:
        raise ValueError("state.json: progress.history: no last losses")
    return state


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def readable_checkpoints(
    folder: Path, say: Say, before: int | None = None
) -> Iterator[tuple[Path, Snapshot]]:
    """Read the checkpoints of a run (those before a step), newest first; each that is corrupt or
    not complete is skipped, and ``say`` gets a line about it."""
    for checkpoint in reversed(checkpoints(folder)):
        if before is None or _step(checkpoint) < before:
            try:
                yield checkpoint, load_checkpoint(checkpoint)
            except UserError as error:
                say(skipped_line(error))


def skipped_line(error: UserError) -> str:
    """The line about a checkpoint that ``error`` says cannot be resumed."""
    return f"warning: skipped: {error.problem}"


def set_aside_after(folder: Path, step: int) -> None:
    """Rename the checkpoints after ``step``, which cannot be resumed, to ``step-N.corrupt``."""
    for later in checkpoints(folder):
        if _step(later) > step:
            aside = later.with_name(f"{later.name}.corrupt")
            remove_path(aside)
            later.rename(aside)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def delete_after(folder: Path, step: int) -> None:
    """Delete the checkpoints after ``step``, from which a run resumes."""
    for later in checkpoints(folder):
        if _step(later) > step:
            remove_path(later)


def _random_states_of(
    tensors: dict[str, Tensor], plain: list[_PlainRandomStates] | _PlainRandomStates
) -> list[RandomStates]:
    """The random states of each process. Raises ValueError for states that cannot be restored."""
    found: list[RandomStates] = []
    for rank, own in enumerate(plain if isinstance(plain, list) else [plain]):
        names = ("cpu", "cuda")
        generators = {n: tensors[k] for n in names if (k := _of_process(rank, n)) in tensors}
        found.append((generators, asdict(own)))
        check_random_states(found[-1])
    if not found:
        raise ValueError("state.json: random: no states")
    return found


def _of_process(rank: int, name: str) -> str:
    return f"{rank}.{name}" if rank else name


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _split_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state dict into tensors named ``INDEX.KEY`` or ``INDEX.GROUP.KEY``, and
    the rest. bitsandbytes keeps its tensors in a group."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        plain[str(index)] = rest = {}
        for key, value in values.items():
            if isinstance(value, dict):
                tensors |= {f"{index}.{key}.{name}": tensor for name, tensor in value.items()}
            elif isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                rest[key] = value
    return _on_host(tensors), {"state": plain, "param_groups": state["param_groups"]}


def _join_tensors(tensors: dict[str, Tensor], plain: _OptimizerState) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for index, values in plain.state.items():
        state[_index(index)] = dict(values)
    for name, tensor in tensors.items():
        index, *group, key = name.split(".", 2)
        if _index(index) not in state:
            raise ValueError(f"optimizer.safetensors: {shown(name)}: not in state.json")
        values = state[int(index)]
        (values.setdefault(group[0], {}) if group else values)[key] = tensor
    return {"state": state, "param_groups": plain.param_groups}


def _index(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"state.json: optimizer.state: {shown(text)} is not a number")
    return int(text)
