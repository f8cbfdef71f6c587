"""``lorakit sweep``: train the members, and compare them."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorakit.distributed.launcher import is_launched
from lorakit.errors import Interrupted, UserError
from lorakit.pipeline.task_data import Say
from lorakit.sweeps.check import halving_note
from lorakit.sweeps.cluster import TaskResult, check_ray, train_on_cluster
from lorakit.sweeps.directory import check_directory, exclusive_sweep
from lorakit.sweeps.halving import Halving
from lorakit.sweeps.load import Sweep, load_sweep, located
from lorakit.sweeps.metric import sweep_metric
from lorakit.sweeps.outcome import complete, describe_failure, fail
from lorakit.sweeps.passes import Pass, make_passes
from lorakit.sweeps.plots import draw
from lorakit.sweeps.progress import SweepProgress
from lorakit.sweeps.results import SweepResult
from lorakit.sweeps.sections import halving_points
from lorakit.sweeps.size import Sizes, with_budget
from lorakit.sweeps.table import write_tables
from lorakit.training.joint import train_joint
from lorakit.training.output_dir import is_complete
from lorakit.training.run import train
from lorakit.training.session import RunResult


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
    continue from their checkpoints. ``ray`` is the address of a Ray cluster, or ``local`` for
    the GPUs of this machine, for members that do not train together. Raises UserError before
    anything is written, and Interrupted after a signal, with checkpoints of what ran.
    """
    checked = sweep if isinstance(sweep, Sweep) else load_sweep(sweep)
    if ray is not None:
        check_ray(checked)
    if is_launched():
        raise UserError(
            "lorakit sweep runs in one process; hint: without torchrun or accelerate launch"
        )
    with located(checked):
        return _sweep(checked, resume, say, ray)


def _sweep(loaded: Sweep, resume: bool, say: Say, ray: str | None) -> SweepResult:
    if not resume:  # before data and models are loaded for an output directory that is taken
        check_directory(loaded, resume)
    loaded = with_budget(loaded, Sizes(), say)
    result = SweepResult(loaded.output_dir, sweep_metric(loaded), loaded.members)
    passes = make_passes(loaded.members, loaded.section.joint, loaded.section.max_joint)
    if note := halving_note(loaded.section, loaded.members):
        say(note)
    with exclusive_sweep(loaded, resume, say):
        halving = _halving(loaded, result)
        _record_complete(loaded, result, halving, say)
        result.write()
        with SweepProgress(result, halving) as progress:
            _Run(loaded, result, progress, halving).all(passes, ray)
        if halving is not None and not any(own.status == "stopped" for own in result.members):
            missed = "" if halving.has_scores else ": none was evaluated after a point"
            say(f"halving stopped no member{missed}")
        write_tables(result)
        draw(result, list(loaded.section.grid), say)
    if result.lacks_metric:
        say(f"no member measured {result.metric}, so the members cannot be compared")
    return result


def _record_complete(loaded: Sweep, result: SweepResult, halving: Halving | None, say: Say) -> None:
    """Record the members that an earlier sweep has completed."""
    count = 0
    for member, own in zip(loaded.members, result.members, strict=True):
        if is_complete(member.recipe):
            count += 1
            complete(own, Path(member.recipe.train.output_dir))
            if halving is not None:
                halving.record(own)
    if count:
        say(f"{count} of {len(result.members)} members are complete")


def _halving(sweep: Sweep, result: SweepResult) -> Halving | None:
    points = halving_points(sweep.section)
    return Halving(points, result) if points else None


class _Run:
    """Trains the members, and records how each ends."""

    def __init__(
        self, sweep: Sweep, result: SweepResult, progress: SweepProgress, halving: Halving | None
    ) -> None:
        self._members, self._result, self._progress = sweep.members, result, progress
        self._halving = halving

    def all(self, passes: Sequence[Pass], address: str | None) -> None:
        """Train one pass after another; with the ``address`` of a cluster, single members there."""
        for part in passes:
            left = self._pending(part.members)
            if not left:
                continue
            if len(part.members) > 1:
                self._together(left)
            elif address is None:
                self._alone(left[0])
            _release_memory()
        left = self._pending(range(len(self._members)))
        if left and address is not None:
            self._on_cluster(left, address)

    def _pending(self, numbers: Sequence[int]) -> list[int]:
        return [at for at in numbers if self._result.members[at].status == "pending"]

    def _alone(self, at: int) -> None:
        member = self._members[at]
        self._progress.started(self._result.members[at])
        try:
            train(
                member.recipe, "auto", self._say_of(at), self._progress.display(member.name),
                stop_at=None if self._halving is None else partial(self._stops, [at], 0),
            )  # fmt: skip
        except Interrupted as error:
            raise self._interrupted(f"{member.name}: {error.problem}", error) from error
        except Exception as error:
            self._ended(at, describe_failure(error, self._folder(at)))
        else:
            self._ended(at, None)

    def _together(self, numbers: Sequence[int]) -> None:
        """Train jointly; if that fails as a whole, what has not ended is trained alone."""
        left = set(numbers)

        def finished(index: int, outcome: RunResult | Exception) -> None:
            at = numbers[index]
            left.discard(at)
            if isinstance(outcome, Exception):
                self._ended(at, describe_failure(outcome, self._folder(at)))
            else:
                self._ended(at, None)

        for at in numbers:
            self._progress.started(self._result.members[at])
        if self._halving is not None:
            self._halving.align({self._members[at].name: self._folder(at) for at in numbers})
        try:
            train_joint(
                [self._members[at].recipe for at in numbers], "auto", self._progress.say, finished,
                stop_at=None if self._halving is None else partial(self._stops, numbers),
                say_of=lambda index: self._say_of(numbers[index]),
                display_of=lambda index: self._progress.display(self._members[numbers[index]].name),
            )  # fmt: skip
        except Interrupted as error:
            raise self._interrupted("interrupted, with checkpoints of what ran", error) from error
        except Exception as error:
            self._progress.say(
                f"joint training failed: {describe_failure(error, self._result.output_dir)}; "
                "training what is left one after another"
            )
            _release_memory()
            for at in sorted(left):
                self._alone(at)

    def _stops(self, numbers: Sequence[int], index: int, step: int, _metrics: object) -> bool:
        assert self._halving is not None
        return self._halving.stops(self._members[numbers[index]].name, step)

    def _say_of(self, at: int) -> Say:
        return partial(self._progress.note, self._members[at].name)

    def _on_cluster(self, numbers: Sequence[int], address: str) -> None:
        results = [self._result.members[at] for at in numbers]
        members = [self._members[at] for at in numbers]

        def started(index: int) -> None:
            self._progress.started(results[index])
            self._progress.follow(results[index].name, self._folder(numbers[index]))

        def ended(index: int, told: TaskResult) -> None:
            for note in told.notes:
                self._progress.note(results[index].name, note)
            self._ended(numbers[index], told.error)

        try:
            train_on_cluster(members, address, self._progress.say, started, ended)
        except Interrupted as error:
            raise self._interrupted(error.problem, error) from error

    def _folder(self, at: int) -> Path:
        return Path(self._members[at].recipe.train.output_dir)

    def _ended(self, at: int, error: str | None) -> None:
        own = self._result.members[at]
        if error is None:
            complete(own, self._folder(at))
            if self._halving is not None:
                self._halving.record(own)
        else:
            fail(own, error)
        self._result.write()
        self._progress.ended(own)

    def _interrupted(self, text: str, error: Interrupted) -> Interrupted:
        members = self._result.members
        done = sum(own.status != "pending" for own in members)
        return Interrupted(
            f"{text}; {done} of {len(members)} members have ended",
            error.signal_number,
            advice="continue with --resume",
        )


def _release_memory() -> None:
    """Free what a run leaves in cycles, before the next one allocates as much."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
