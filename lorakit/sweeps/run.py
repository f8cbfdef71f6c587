"""``lorakit sweep``: train the members, and compare them."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorakit.distributed.launcher import is_launched
from lorakit.errors import Interrupted, UserError
from lorakit.pipeline.task_data import Say
from lorakit.sweeps.cluster import TaskResult, check_ray, train_on_cluster
from lorakit.sweeps.directory import exclusive_sweep
from lorakit.sweeps.load import Sweep, load_sweep, located
from lorakit.sweeps.metric import sweep_metric
from lorakit.sweeps.outcome import complete, describe_failure, fail
from lorakit.sweeps.plots import draw
from lorakit.sweeps.progress import SweepProgress
from lorakit.sweeps.results import SweepResult
from lorakit.sweeps.size import Sizes, with_budget
from lorakit.sweeps.table import write_tables
from lorakit.training.run import train


def sweep(
    sweep: Sweep | str | Path | Mapping[str, Any],
    resume: bool = False,
    say: Say = lambda text: None,
    *,
    ray: str | None = None,
) -> SweepResult:
    """Train the members of a sweep: a sweep file, a mapping with its keys, or a loaded one.

    A member that fails does not end the others: its result has the error. ``resume`` continues a
    sweep in its output directory, or starts it; members that are complete are kept, and others
    continue from their checkpoints. ``ray`` is the address of a cluster of Ray, or ``local`` for
    the GPUs of this machine. Raises UserError before anything is written, and Interrupted after a
    signal, with a checkpoint of what ran.
    """
    checked = sweep if isinstance(sweep, Sweep) else load_sweep(sweep)
    if ray is not None:
        check_ray()
    if is_launched():
        raise UserError(
            "lorakit sweep runs in one process; hint: without torchrun or accelerate launch"
        )
    with located(checked):
        return _sweep(checked, resume, say, ray)


def _sweep(loaded: Sweep, resume: bool, say: Say, ray: str | None) -> SweepResult:
    loaded = with_budget(loaded, Sizes(), say)
    result = SweepResult(loaded.output_dir, sweep_metric(loaded), loaded.members)
    with exclusive_sweep(loaded, resume):
        result.write()
        with SweepProgress(result) as progress:
            run = _Run(loaded, result, progress)
            run.on_cluster(ray) if ray is not None else run.one_by_one()
        write_tables(result)
        draw(result, list(loaded.section.grid), say)
    if result.best is None and any(own.status == "completed" for own in result.members):
        say(f"no member measured {result.metric}, so that they cannot be compared")
    return result


class _Run:
    """Trains the members, and records how each ends."""

    def __init__(self, sweep: Sweep, result: SweepResult, progress: SweepProgress) -> None:
        self._members, self._result, self._progress = sweep.members, result, progress

    def one_by_one(self) -> None:
        for at, member in enumerate(self._members):
            say = partial(self._progress.note, member.name)
            self._progress.started(self._result.members[at])
            try:
                train(member.recipe, "auto", say, self._progress.display(member.name))
            except Interrupted as error:
                raise self._interrupted(f"{member.name}: {error}", error) from error
            except Exception as error:
                self._ended(at, describe_failure(error, self._folder(at)))
            else:
                self._ended(at, None)
            _release_memory()

    def on_cluster(self, address: str) -> None:
        results = self._result.members

        def started(at: int) -> None:
            self._progress.started(results[at])
            self._progress.follow(results[at].name, self._folder(at))

        def ended(at: int, told: TaskResult) -> None:
            for note in told.notes:
                self._progress.note(results[at].name, note)
            self._ended(at, told.error)

        try:
            train_on_cluster(self._members, address, self._progress.say, started, ended)
        except Interrupted as error:
            raise self._interrupted(str(error), error) from error

    def _folder(self, at: int) -> Path:
        return Path(self._members[at].recipe.train.output_dir)

    def _ended(self, at: int, error: str | None) -> None:
        own = self._result.members[at]
        if error is None:
            complete(own, self._folder(at))
        else:
            fail(own, error)
        self._result.write()
        self._progress.ended(own)

    def _interrupted(self, text: str, error: Interrupted) -> Interrupted:
        members = self._result.members
        done = sum(own.status != "pending" for own in members)
        return Interrupted(
            f"{text.removesuffix('; continue with --resume auto')}; {done} of {len(members)} "
            "members have ended; continue with --resume",
            error.exit_code - 128,
        )


def _release_memory() -> None:
    """Free what a run leaves in cycles, before the next one allocates as much."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
