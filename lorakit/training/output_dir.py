"""The output directory: where a run starts or resumes, and its lock.

A run is resumed, or replaced if that is asked for.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.adapters.peft.schema import CONFIG, WEIGHTS
from lorakit.distributed.launcher import launch_id
from lorakit.errors import UserError
from lorakit.io.atomic import writing
from lorakit.notes import Say, silent
from lorakit.recipe.sections import Recipe
from lorakit.training.checkpoint import (
    Snapshot,
    checkpoints,
    load_checkpoint,
    readable_checkpoints,
)
from lorakit.training.earlier_run import is_run, is_set_aside, put_back_if_killed, set_aside
from lorakit.training.run_json import read_run
from lorakit.training.same_run import check_same_recipe, has_other_length
from lorakit.training.tracking import PROJECT

#: What a sweep writes to its output directory, where no run may start.
SWEEP_YAML, SWEEP_JSON = "sweep.yaml", "sweep.json"
#: The checkpoints in an output directory, and run.json if the run is complete.
Found = tuple[list[Path], dict[str, Any] | None]


@dataclass(frozen=True)
class Start:
    """Where a run starts: from ``checkpoint``, from scratch (None), or not at all, because it is
    complete (``finished`` is its run.json). ``found`` is what the output directory contains.
    ``is_named``: ``--resume`` names the checkpoint. ``replaces``: the run in the output directory
    gives way to this one."""

    checkpoint: Path | None = None
    snapshot: Snapshot | None = None
    finished: dict[str, Any] | None = None
    found: Found = field(default_factory=lambda: ([], None))
    is_named: bool = False
    replaces: bool = False

    @property
    def step(self) -> int:
        return self.snapshot.progress.step if self.snapshot else 0


def find_start(
    recipe: Recipe, resume: str | None, say: Say = silent, overwrite: bool = False
) -> Start:
    """Find the run in the output directory and the checkpoint that ``resume`` names; ``auto`` names
    the newest that can be read, and ``say`` gets a line about each that cannot. What the launcher
    starts again continues as with ``auto``. With ``overwrite``, a new run replaces the one found.
    What ``restore_earlier_run`` puts back is found, too.

    Raises UserError if both are given, if there is a sweep, or a run that is in use or that
    ``resume`` does not continue, if the recipe is not that run's, or if the checkpoint, or with
    ``auto`` each one, is corrupt.
    """
    if overwrite and resume is not None:
        raise UserError("--resume and --overwrite are mutually exclusive; allowed: one of them")
    output_dir = Path(recipe.train.output_dir)
    _check_no_file(output_dir)
    _check_no_sweep(output_dir)
    restore_earlier_run(output_dir, say)
    folder = output_dir / "checkpoints"
    contents = found, finished = _find(output_dir)
    if (found or finished) and resume != "auto" and _is_restarted(output_dir):
        say("restarted by the launcher: continuing as with --resume auto")
        resume, overwrite = "auto", False
    if overwrite:
        return Start(found=contents, replaces=is_run(output_dir))
    named = None if resume in (None, "auto") else _checkpoint_at(str(resume))
    is_own = named is not None and named.parent.resolve() == folder.resolve()
    if (found or finished) and resume != "auto" and not is_own:
        raise UserError(
            f"train.output_dir: {output_dir}: contains "
            + ("a finished run; " if finished else f"a run at {found[-1].name}; ")
            + ("" if finished else "continue it with --resume auto, or ")
            + "choose another directory, or replace it with --overwrite"
        )
    if named is not None:
        check_same_recipe(recipe, named.parent.parent)
        return Start(named, load_checkpoint(named), found=contents, is_named=True)
    if not (finished or found):
        return Start()
    check_same_recipe(recipe, output_dir)
    if finished and not has_other_length(recipe, output_dir):
        return Start(finished=finished, found=contents)
    for checkpoint, snapshot in readable_checkpoints(folder, say):
        if finished and snapshot.progress.stopped_early:
            step = snapshot.progress.step
            say(f"the run stopped early, at step {step}; more steps would not change that")
            return Start(finished=finished, found=contents)
        return Start(checkpoint, snapshot, found=contents)
    raise none_to_resume(folder)


def _is_restarted(output_dir: Path) -> bool:
    launch = launch_id()
    return launch is not None and launch == read_run(output_dir).get("launch")


def none_to_resume(folder: Path) -> UserError:
    return UserError(
        f"--resume auto: {folder}: no checkpoint can be resumed; delete this directory to start "
        "the run again"
    )


def _check_no_file(output_dir: Path) -> None:
    try:
        is_file = output_dir.exists() and not output_dir.is_dir()
    except OSError as error:  # too long
        raise UserError(f"train.output_dir: cannot be created: {error.strerror}") from None
    if is_file:
        raise UserError(f"train.output_dir: {output_dir}: a file with that name exists")
    for folder in (output_dir / "adapter", output_dir / "checkpoints"):
        if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
            raise UserError(f"train.output_dir: {folder}: exists and is not a directory")


def _check_no_sweep(output_dir: Path) -> None:
    if any((output_dir / name).is_file() for name in (SWEEP_YAML, SWEEP_JSON)):
        raise UserError(
            f"train.output_dir: {output_dir}: contains a sweep; choose another directory"
        )


def restore_earlier_run(output_dir: Path, say: Say) -> None:
    """Put back the run that a run with ``--overwrite`` was to replace, if that was killed before
    its first checkpoint, and ``say`` so. Raises UserError if that run is not killed but going on.
    """
    if not is_set_aside(output_dir):
        return
    with locked_directory(output_dir, "train.output_dir", "run"), writing(output_dir):
        if put_back_if_killed(output_dir):
            say(
                f"{output_dir}: restored the earlier run: the run replacing it was killed before "
                "its first checkpoint"
            )


def _find(output_dir: Path) -> Found:
    return checkpoints(output_dir / "checkpoints"), _finished_run(output_dir)


def is_complete(recipe: Recipe) -> bool:
    """Whether the run of ``recipe`` in its output directory has nothing left to do."""
    output_dir = Path(recipe.train.output_dir)
    return _finished_run(output_dir) is not None and not has_other_length(recipe, output_dir)


def _finished_run(output_dir: Path) -> dict[str, Any] | None:
    """The run.json of a complete run, whose adapter is there."""
    run, adapter = read_run(output_dir), output_dir / "adapter"
    is_finished = run.get("exit_reason") == "completed" and all(
        (adapter / name).is_file() for name in (CONFIG, WEIGHTS)
    )
    return run if is_finished else None


def rows_read_before(start: Start) -> dict[str, int]:
    """Return what ``run.json`` records about the stream of the run that ended where this starts."""
    if start.checkpoint is None:
        return {}
    run = read_run(start.checkpoint.parent.parent)
    train = (run.get("data") or {}).get("train") or {}
    if run.get("steps") != start.step or "rows_read" not in train:
        return {}
    return {key: train[key] for key in ("rows_read", "skipped_rows") if key in train}


def init_from_before(start: Start) -> dict[str, str] | None:
    """Return what ``run.json`` records about the adapter that the run to resume started from."""
    return read_run(start.checkpoint.parent.parent).get("init_from") if start.checkpoint else None


@contextmanager
def exclusive_run(recipe: Recipe, start: Start) -> Iterator[Path]:
    """Create the output directory and lock it against other runs during the block.

    Raises UserError if it cannot be created, if another run has locked it, or has written to it
    since ``start`` was found. If the block raises UserError before it has written a checkpoint, or
    any error if it replaces a run, the directory is restored to what it was.
    """
    output_dir = Path(recipe.train.output_dir)
    created = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    with locked_directory(output_dir, "train.output_dir", "run"):
        if _find(output_dir) != start.found:
            raise UserError(f"train.output_dir: {output_dir}: another run has just written to it")
        if start.replaces:
            with set_aside(output_dir):
                yield output_dir
            return
        before, had_logs = _run_files(output_dir), (output_dir / PROJECT).exists()
        try:
            yield output_dir
        except UserError:
            if checkpoints(output_dir / "checkpoints") == start.found[0]:
                if not had_logs:  # TensorBoard's
                    shutil.rmtree(output_dir / PROJECT, ignore_errors=True)
                _restore(output_dir, before, created)
            raise


@contextmanager
def locked_directory(folder: Path, key: str, what: str) -> Iterator[None]:
    """Create ``folder``, the value of ``key``, and lock it during the block.

    Raises UserError if it cannot be created, or if ``what`` in another process has locked it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {folder}: cannot be created: {error}") from error
    try:
        if not _lock(handle):
            raise UserError(f"{key}: {folder}: another {what} is writing to it")
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Whether no other process has the lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the guard notices another run
        return True
    return True


def _run_files(output_dir: Path) -> dict[Path, bytes]:
    """The files that a run writes when it starts, with their contents."""
    files = [output_dir / name for name in ("recipe.yaml", "run.json", "metrics.jsonl")]
    return {file: file.read_bytes() for file in files if file.is_file()}


def _restore(output_dir: Path, before: Mapping[Path, bytes], created: Sequence[Path]) -> None:
    """Undo what a run without a new checkpoint wrote; ``created`` are the directories that it
    created, innermost first."""
    for file in _run_files(output_dir):
        if file in before:
            file.write_bytes(before[file])
        else:
            file.unlink()
    for folder in created:
        if any(folder.iterdir()):
            break
        folder.rmdir()


def _checkpoint_at(directory: str) -> Path:
    """``directory`` itself, or the newest checkpoint in a run's directory."""
    found = checkpoints(Path(directory) / "checkpoints")
    checkpoint = found[-1] if found else Path(directory)
    if not directory or not (checkpoint / "state.json").is_file():
        raise UserError(
            f"--resume: {directory!r}: not a checkpoint; allowed: auto, a step-N directory, or "
            "a run's directory"
        )
    return checkpoint
