"""``lorakit sweep``: train the members, and compare them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.distributed.group import init_process_group, is_main, rank_and_world_size
from lorakit.distributed.processes import gather, run_on_main
from lorakit.errors import Interrupted, counted, duration
from lorakit.notes import Say, silent
from lorakit.sweeps.check import check_data, halving_note
from lorakit.sweeps.cluster import check_ray
from lorakit.sweeps.directory import check_directory, exclusive_sweep
from lorakit.sweeps.halving import Halving
from lorakit.sweeps.jobs import Job, make_jobs
from lorakit.sweeps.load import Sweep, load_sweep, located
from lorakit.sweeps.member_runs import MemberRuns
from lorakit.sweeps.metric import sweep_metric
from lorakit.sweeps.outcome import complete
from lorakit.sweeps.plots import draw
from lorakit.sweeps.progress import SweepProgress
from lorakit.sweeps.record import MainRecord
from lorakit.sweeps.results import SweepResult
from lorakit.sweeps.sections import halving_points
from lorakit.sweeps.shared import (
    check_agreement,
    check_processes,
    check_visible,
    is_restarted,
    train_shared,
)
from lorakit.sweeps.size import Sizes, with_budget
from lorakit.sweeps.table import write_tables
from lorakit.training.output_dir import is_complete


def sweep(
    sweep: Sweep | str | Path | Mapping[str, Any],
    resume: bool = False,
    say: Say = silent,
    *,
    ray: str | None = None,
) -> SweepResult:
    """Train the members of a sweep: a sweep file, a mapping with its keys, or a loaded one.

    A member that fails does not end the others: its result has the error. ``resume`` continues a
    sweep in its output directory, or starts it; members that are complete are kept, and others
    continue from their checkpoints. ``ray`` is the address of a Ray cluster, or ``local`` for
    the GPUs of this machine, for members that do not train together. If a launcher has started
    several processes, they share the members, the first one writes, and all return the result.
    Raises UserError before anything is written, and Interrupted after a signal, with checkpoints of
    what ran.
    """
    checked = sweep if isinstance(sweep, Sweep) else load_sweep(sweep)
    init_process_group()
    with located(checked):
        check_processes(checked, ray)
        if ray is not None:
            check_ray(checked)
        return _sweep(checked, resume, say if is_main() else silent, ray)


def _sweep(loaded: Sweep, resume: bool, say: Say, ray: str | None) -> SweepResult:
    resume = run_on_main(lambda: resume or is_restarted(loaded, say))
    if not resume:  # before data and models are loaded for an output directory that is taken
        run_on_main(lambda: check_directory(loaded, resume))
    loaded = with_budget(loaded, Sizes(), say)
    check_agreement(loaded)
    result = SweepResult(loaded.output_dir, sweep_metric(loaded), loaded.members)
    jobs = run_on_main(lambda: make_jobs(loaded.members, loaded.section))
    if note := halving_note(loaded.section, loaded.members):
        say(note)
    left = [member for member in loaded.members if not is_complete(member.recipe)]
    run_on_main(lambda: check_data(left, say))
    began = time.monotonic()
    with _exclusive(loaded, resume, say):
        halving = _halving(loaded, result)
        jobs = run_on_main(lambda: _begin(loaded, result, jobs, halving, say))
        if rank_and_world_size()[1] > 1:
            train_shared(loaded, result, jobs)
        else:
            _train(loaded, result, jobs, halving, ray)
        run_on_main(lambda: _end(loaded, result, halving, say))
        result.members = run_on_main(lambda: result.members)
    if jobs:
        say(f"sweep finished in {duration(time.monotonic() - began)}")
    if result.lacks_metric:
        say(f"no member measured {result.metric}, so the members cannot be compared")
    return result


@contextmanager
def _exclusive(sweep: Sweep, resume: bool, say: Say) -> Iterator[None]:
    """``exclusive_sweep`` in the main process, for which the others wait."""
    if not is_main():
        gather(None)
        check_visible(sweep)
        yield
        return
    with exclusive_sweep(sweep, resume, say):
        gather(None)
        yield


def _begin(
    loaded: Sweep, result: SweepResult, jobs: Sequence[Job], halving: Halving | None, say: Say
) -> list[Job]:
    """Record the members that an earlier sweep has completed; return the jobs without them."""
    left = set(range(len(result.members)))
    for at, (member, own) in enumerate(zip(loaded.members, result.members, strict=True)):
        if is_complete(member.recipe):
            left.remove(at)
            complete(own, Path(member.recipe.train.output_dir))
            if halving is not None:
                halving.record(own)
    if count := len(result.members) - len(left):
        say(f"{count} of {counted(len(result.members), 'member')} had already finished")
    result.write()
    some = (replace(job, members=tuple(at for at in job.members if at in left)) for job in jobs)
    return [job for job in some if job.members]


def _train(
    loaded: Sweep,
    result: SweepResult,
    jobs: Sequence[Job],
    halving: Halving | None,
    ray: str | None,
) -> None:
    """Train one job after another; with the address ``ray``, single members there."""
    with SweepProgress(result, halving) as progress:
        record = MainRecord(loaded, result, progress, halving)
        runs = MemberRuns(loaded, record, halving)
        try:
            for job in jobs:
                if ray is None or job.reason is None:
                    runs.train(job)
            pending = [at for at, own in enumerate(result.members) if own.status == "pending"]
            if pending and ray is not None:
                runs.train_on_cluster(pending, ray, record)
        except Interrupted as error:
            raise record.interrupted(error) from error


def _end(loaded: Sweep, result: SweepResult, halving: Halving | None, say: Say) -> None:
    if halving is not None and not any(own.status == "stopped" for own in result.members):
        missed = "" if halving.has_measured else ": none was evaluated after a point"
        say(f"halving stopped no member{missed}")
    write_tables(result)
    draw(result, list(loaded.section.grid), say)


def _halving(sweep: Sweep, result: SweepResult) -> Halving | None:
    points = halving_points(sweep.section)
    return Halving(points, result) if points else None
