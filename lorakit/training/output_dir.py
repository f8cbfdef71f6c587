"""The output directory: where a run starts or resumes, and its lock.

A run is never overwritten, only resumed.
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

from lorakit import registry
from lorakit.adapters.peft.schema import CONFIG, WEIGHTS
from lorakit.data.stream import have_same_head
from lorakit.distributed.launcher import launch_id
from lorakit.distributed.processes import rank_and_world_size
from lorakit.errors import UserError, shown
from lorakit.methods.base import Method
from lorakit.pipeline.task_data import Say
from lorakit.recipe.load import load_recipe
from lorakit.recipe.sections import Recipe
from lorakit.recipe.yaml_source import read_yaml
from lorakit.training.batching import split_step, step_size
from lorakit.training.checkpoint import (
    Snapshot,
    checkpoints,
    load_checkpoint,
    readable_checkpoints,
)
from lorakit.training.run_json import read_run
from lorakit.training.tracking import PROJECT
from lorakit.user_code import code_identity, is_code

#: Keys that a resumed run may change: they do not affect the result.
_CHANGEABLE = {
    "train.output_dir",
    "train.log_every_steps",
    "train.save_every_steps",
    "train.save_total_limit",
    "train.trackers",
}
#: Keys that together decide what a step trains on.
_BATCH = {"train.per_device_batch_size", "train.gradient_accumulation_steps"}
#: Keys of the task whose defaults are reduced to what the model supports.
_FITTED = {"max_length", "max_new_tokens"}
#: The checkpoints in an output directory, and run.json if the run is complete.
Found = tuple[list[Path], dict[str, Any] | None]


@dataclass(frozen=True)
class Start:
    """Where a run starts: from ``checkpoint``, from scratch (None), or not at all, because it is
    complete (``finished`` is its run.json). ``found`` is what the output directory contains.
    ``is_named``: ``--resume`` names the checkpoint."""

    checkpoint: Path | None = None
    snapshot: Snapshot | None = None
    finished: dict[str, Any] | None = None
    found: Found = field(default_factory=lambda: ([], None))
    is_named: bool = False

    @property
    def step(self) -> int:
        return self.snapshot.progress.step if self.snapshot else 0


def find_start(recipe: Recipe, resume: str | None, say: Say = lambda text: None) -> Start:
    """Find the run in the output directory and the checkpoint that ``resume`` names; ``auto`` names
    the newest that can be read, and ``say`` gets a line about each that cannot. What the launcher
    starts again continues as with ``auto``.

    Raises UserError if there is a run that ``resume`` does not continue, if the recipe is not that
    run's, or if the checkpoint, or with ``auto`` each one, is corrupt.
    """
    output_dir = Path(recipe.train.output_dir)
    _check_no_file(output_dir)
    folder = output_dir / "checkpoints"
    contents = found, finished = _find(output_dir)
    if (found or finished) and resume != "auto" and _is_restarted(output_dir):
        say("restarted by the launcher: continuing as with --resume auto")
        resume = "auto"
    named = None if resume in (None, "auto") else _checkpoint_at(str(resume))
    is_own = named is not None and named.parent.resolve() == folder.resolve()
    if (found or finished) and resume != "auto" and not is_own:
        raise UserError(
            f"train.output_dir: {output_dir} contains "
            + ("a finished run; " if finished else f"a run at {found[-1].name}; ")
            + ("" if finished else "continue it with --resume auto, or ")
            + "choose another directory"
        )
    if named is not None:
        check_same_recipe(recipe, named.parent.parent)
        return Start(named, load_checkpoint(named), found=contents, is_named=True)
    if not (finished or found):
        return Start()
    check_same_recipe(recipe, output_dir)
    if finished:
        return Start(finished=finished, found=contents)
    for checkpoint, snapshot in readable_checkpoints(folder, say):
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


def _find(output_dir: Path) -> Found:
    return checkpoints(output_dir / "checkpoints"), _finished_run(output_dir)


def _finished_run(output_dir: Path) -> dict[str, Any] | None:
    """The run.json of a complete run, whose adapter is there."""
    run, adapter = read_run(output_dir), output_dir / "adapter"
    is_finished = run.get("exit_reason") == "completed" and all(
        (adapter / name).is_file() for name in (CONFIG, WEIGHTS)
    )
    return run if is_finished else None


def check_same_data(data: dict[str, Any], checkpoint: Path, say: Say) -> int:
    """Raise UserError if the rows are not those of the run that wrote ``checkpoint``.

    If a bad row of a stream ended the run, it may continue with corrected files, which begin with
    the same bytes but differ in size. Return the number of rows that these need to have, or 0 if
    nothing has changed.
    """
    run = read_run(checkpoint.parent.parent)
    before, rows = run.get("data") or {}, 0
    for split in before.keys() | data.keys() if before else ():
        then, now = ((of.get(split) or {}).get("fingerprint") for of in (before, data))
        if then != now:
            source = (data.get(split) or before[split])["source"]
            if not (run.get("bad_row") and have_same_head(then, now)):
                raise UserError(
                    f"--resume: {source}: the {split} data has changed since the run started"
                )
            say(f"{source}: changed since a bad row ended the run; earlier rows are not checked")
            rows = int((before.get(split) or {}).get("rows_read") or 0)
        tokens = [(of.get(split) or {}).get("tokens") for of in (before, data)]
        if then == now and None not in tokens and tokens[0] != tokens[1]:
            raise UserError(
                f"--resume: {data[split]['source']}: the {split} data has {tokens[1]:,} tokens, "
                f"but had {tokens[0]:,} when the run started: the tokenizer, the chat template or "
                "lorakit itself has changed; start a new run"
            )
    return rows


def rows_read_before(start: Start) -> dict[str, int]:
    """Return what ``run.json`` records about the stream of the run that ended where this starts."""
    if start.checkpoint is None:
        return {}
    run = read_run(start.checkpoint.parent.parent)
    train = (run.get("data") or {}).get("train") or {}
    if run.get("steps") != start.step or "rows_read" not in train:
        return {}
    return {key: train[key] for key in ("rows_read", "skipped_rows") if key in train}


@contextmanager
def exclusive_run(recipe: Recipe, start: Start) -> Iterator[Path]:
    """Create the output directory and lock it against other runs during the block.

    Raises UserError if it cannot be created, if another run has locked it, or has written to it
    since ``start`` was found. If the block raises UserError before it has written a checkpoint, the
    directory is restored to what it was.
    """
    output_dir = Path(recipe.train.output_dir)
    created = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(output_dir, os.O_RDONLY)
    except (OSError, ValueError) as error:
        raise UserError(f"train.output_dir: {output_dir}: cannot be created: {error}") from error
    try:
        _lock(handle)
        if _find(output_dir) != start.found:
            raise UserError(f"train.output_dir: {output_dir}: another run has just written to it")
        before, had_logs = _run_files(output_dir), (output_dir / PROJECT).exists()
        try:
            yield output_dir
        except UserError:
            if checkpoints(output_dir / "checkpoints") == start.found[0]:
                if not had_logs:  # TensorBoard's
                    shutil.rmtree(output_dir / PROJECT, ignore_errors=True)
                _restore(output_dir, before, created)
            raise
    except BlockingIOError as error:
        raise UserError(f"train.output_dir: {output_dir}: another run is writing to it") from error
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    """Raises BlockingIOError if another process has the lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks: the guard notices another run
        return


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


def check_same_recipe(recipe: Recipe, output_dir: Path, prepared: bool = False) -> None:
    """Raise UserError unless ``recipe`` describes the run that started in ``output_dir``. Labels
    found in the data may differ, and as long as the recipe is not ``prepared``, defaults that
    depend on the model."""
    path = output_dir / "recipe.yaml"
    if not path.is_file():
        return
    _check_same_code(recipe, output_dir)
    _check_same_files(recipe, path)
    started, recipe = load_recipe(path), with_started_batch_size(recipe, output_dir)
    _check_same_steps(started, recipe, output_dir)
    before, now = flat_keys(started.resolved()), flat_keys(recipe.resolved())
    later = set() if prepared else {f"task.{k}" for k in _FITTED - recipe.task.model_fields_set}
    changed = [
        key
        for key in sorted({*before, *now} - _CHANGEABLE - _BATCH - later)
        if not _are_same(before.get(key), now.get(key))
        and not (key == "task.labels" and now.get(key) is None)
    ]
    if changed:
        listed = "; ".join(
            f"{k}: was {shown(before.get(k))}, now {shown(now.get(k))}" for k in changed
        )
        raise UserError(f"--resume: the recipe differs from {path}: {listed}")


def with_started_batch_size(recipe: Recipe, output_dir: Path) -> Recipe:
    """Return ``recipe`` with the batch size that ``auto`` chose for the run in ``output_dir``, if
    the processes can split a step into such batches."""
    path = output_dir / "recipe.yaml"
    if recipe.train.per_device_batch_size != "auto" or not path.is_file():
        return recipe
    size, processes = load_recipe(path).train.per_device_batch_size, rank_and_world_size()[1]
    if not isinstance(size, int) or (recipe.train.rows_per_step or 0) % (size * processes):
        return recipe
    return split_step(recipe, size, processes)


def _check_same_steps(before: Recipe, now: Recipe, output_dir: Path) -> None:
    """Raise UserError unless the steps of the run in ``output_dir`` have the same rows as those of
    this run; over how many processes and batches they are split may differ."""
    recorded = read_run(output_dir).get("hardware") or {}
    processes = recorded.get("processes") or 1, rank_and_world_size()[1]
    if step_size(before, processes[0]) != step_size(now, processes[1]):
        then, this = (
            f"per_device_batch_size {recipe.train.per_device_batch_size} x "
            f"gradient_accumulation_steps {recipe.train.gradient_accumulation_steps} x "
            f"{count} processes"
            for recipe, count in zip((before, now), processes, strict=True)
        )
        raise UserError(
            f"--resume: a step has other rows than those of {output_dir}: was {then}, now {this}; "
            "allowed: the same product"
        )


def _check_same_files(recipe: Recipe, stored: Path) -> None:
    """Raise UserError if loading the recipe in an output directory would run other Python files
    than those that ``recipe`` names."""
    written = read_yaml(stored).data
    for section, key in (("adapter", "method"), ("task", "name")):
        keys = written.get(section)
        before = keys.get(key) if isinstance(keys, dict) else None
        now = getattr(getattr(recipe, section), key)
        runs = isinstance(before, str) and (registry.is_user_task(before) or "${" in before)
        if runs and not _are_same(before, now):
            raise UserError(
                f"--resume: the recipe differs from {stored}: {section}.{key}: was "
                f"{shown(before)}, now {shown(now)}"
            )


def _check_same_code(recipe: Recipe, output_dir: Path) -> None:
    """Raise UserError if the code of a user's method is not that of the run in ``output_dir``."""
    method: Method = registry.method(recipe.adapter.method)
    before = read_run(output_dir).get("method_digest")
    if None not in (before, method.digest) and before != method.digest:
        raise UserError(
            f"--resume: the code of {method.name} has changed since the run in {output_dir} "
            f"started; restore it, or choose another train.output_dir for a new run"
        )


def _are_same(before: object, now: object) -> bool:
    """Whether two values of a key are equal, or name the same class of the same file."""
    if isinstance(before, str) and isinstance(now, str) and is_code(before) and is_code(now):
        return code_identity(before) == code_identity(now)
    return before == now


def flat_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved recipe as one mapping from ``section.key`` to values."""
    return {f"{part}.{key}": v for part, keys in values.items() for key, v in keys.items()}
