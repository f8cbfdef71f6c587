"""Finding the runs of a report, and reading their directories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from lorakit.errors import UserError, counted
from lorakit.recipe.yaml_source import MAX_BYTES, read_yaml
from lorakit.reports.metrics_log import MetricsLog, as_number, read_metrics
from lorakit.training.run_json import read_json

#: Any of these makes a directory that of a run, or of a sweep.
_RUN_FILES = ("run.json", "metrics.jsonl", "recipe.yaml")
_SWEEP_FILES = ("sweep.json", "sweep.yaml")
_MEMBERS = "members"
#: All files that are read of a directory.
FILES = (*_RUN_FILES, "predictions.json", *_SWEEP_FILES)
#: No file of a run is nested as deep.
_MOST_DEPTH = 20


@dataclass(frozen=True)
class Run:
    """A run's directory: what could be read of its files. ``name`` is unique in a report. ``notes``
    say what could not be read. ``sweep`` is what ``sweep.json`` says of a sweep's member."""

    name: str
    directory: Path
    recipe: dict[str, Any]
    recipe_text: str
    record: dict[str, Any]
    log: MetricsLog
    predictions: dict[str, Any]
    notes: tuple[str, ...]
    sweep: dict[str, Any]

    @property
    def sweep_name(self) -> str | None:
        """The name of the sweep that the run is a member of."""
        folder = self.directory.absolute().parent
        is_member = folder.name == _MEMBERS and _is_sweep(folder.parent)
        return folder.parent.name if is_member else None

    @property
    def status(self) -> str:
        """``completed``, ``interrupted``, ``failed`` or, before its end was recorded, ``running or
        killed``; of a sweep's member also ``pending`` and ``stopped``."""
        reason, status = self.record.get("exit_reason"), self.sweep.get("status")
        if isinstance(reason, str) and status != "stopped":  # halving ends a run like any other
            return reason
        if isinstance(status, str) and status != "completed":
            return status
        return "running or killed" if self.record or self.log.curves else "not started"

    @property
    def message(self) -> str:
        """Why the run ended, if it did not complete."""
        told = self.record.get("message") or self.sweep.get("error")
        return told if isinstance(told, str) else ""

    @property
    def metrics(self) -> dict[str, float]:
        """The final evaluation's, or else those of the last evaluation so far."""
        final = self.record.get("metrics")
        if isinstance(final, dict) and final:
            numbers = {name: as_number(value) for name, value in final.items()}
            return {name: number for name, number in numbers.items() if number is not None}
        evaluated = {n: c for n, c in self.log.curves.items() if n.startswith("eval.")}
        return {name.removeprefix("eval."): curve[-1][1] for name, curve in evaluated.items()}


def read_runs(paths: Sequence[str | PathLike[str]]) -> list[Run]:
    """Read the run directories in ``paths``; for a sweep's, those of its members.

    Raises UserError for a path that is neither.
    """
    if not paths:
        raise UserError("no run given; allowed: directories of runs and of sweeps")
    found: dict[Path, dict[str, Any]] = {}
    for path in paths:
        for directory, sweep in _directories(Path(path)):
            found.setdefault(directory, sweep)
    names = _names(list(found))
    return [_read(names[at], *each) for at, each in enumerate(found.items())]


def _directories(path: Path) -> Iterable[tuple[Path, dict[str, Any]]]:
    """The directories of the runs in ``path``, and what a sweep says of each."""
    try:
        if not path.is_dir():
            raise UserError(f"{path}: no such directory; allowed: that of a run or of a sweep")
        if _is_sweep(path):
            return _members(path)
        if any((path / name).is_file() for name in _RUN_FILES):
            return [(path, {})]
    except (OSError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: {error}") from None
    raise UserError(
        f"{path}: contains neither a run nor a sweep: none of {', '.join(_RUN_FILES)}, "
        f"{', '.join(_SWEEP_FILES)}"
    )


def _is_sweep(path: Path) -> bool:
    return any((path / name).is_file() for name in _SWEEP_FILES)


def _members(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    listed = read_json(path / "sweep.json").get("members")
    told = {
        each["name"]: each
        for each in (listed if isinstance(listed, list) else [])
        if isinstance(each, dict) and isinstance(each.get("name"), str)
    }
    folder = path / _MEMBERS
    there = sorted(own.name for own in folder.iterdir() if own.is_dir()) if folder.is_dir() else []
    order = {name: at for at, name in enumerate(told)}
    names = sorted(there, key=lambda name: order.get(name, len(order)))
    members = [(folder / name, told.get(name, {})) for name in names if not name.startswith(".")]
    if not members:
        raise UserError(f"{path}: the sweep has no members yet")
    return members


def _names(directories: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as tell them apart."""
    full = [Path(directory).absolute().parts for directory in directories]
    for count in range(1, max(map(len, full))):
        names = ["/".join(parts[-count:]) for parts in full]
        if len(set(names)) == len(names):
            return names
    return [str(directory) for directory in directories]


def _read(name: str, directory: Path, sweep: dict[str, Any]) -> Run:
    notes = []
    text, recipe = "", {}
    try:
        file = directory / "recipe.yaml"
        if file.is_file():
            with file.open(encoding="utf-8", errors="replace") as lines:
                text = lines.read(MAX_BYTES)
            recipe = read_yaml(file).data
        else:
            notes.append("recipe.yaml: no such file")
    except (OSError, UserError) as error:
        notes.append(f"recipe.yaml: not readable: {error}")
    record, predictions = (
        _shallow(read_json(directory / name)) for name in ("run.json", "predictions.json")
    )
    if not record and (directory / "run.json").exists():
        notes.append("run.json: not readable")
    log = read_metrics(directory / "metrics.jsonl")
    if log.unreadable_lines:
        notes.append(f"metrics.jsonl: {counted(log.unreadable_lines, 'line')} not readable")
    return Run(name, directory, recipe, text, record, log, predictions, tuple(notes), sweep)


def _shallow(found: dict[str, Any]) -> dict[str, Any]:
    """``found``, or nothing if it is nested so deep that no run can have written it."""
    return found if _is_shallow(found, _MOST_DEPTH) else {}


def _is_shallow(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in inner)
