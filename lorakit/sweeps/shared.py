"""A sweep in the processes of a launcher: each takes the next members when it is free.

All of them read and write the output directory. The first process records how the members are
doing; the others tell it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lorakit.distributed.group import ConnectionLost, alone, is_first
from lorakit.distributed.launcher import check_whole_models, is_launched, launch_id
from lorakit.distributed.processes import gather
from lorakit.distributed.watch import Watch, watch_peers
from lorakit.errors import Interrupted, LorakitError, UserError
from lorakit.notes import Say
from lorakit.sweeps.jobs import Job
from lorakit.sweeps.load import Sweep
from lorakit.sweeps.member_runs import MemberRuns
from lorakit.sweeps.progress import SweepProgress
from lorakit.sweeps.record import RESUME, MainRecord, Record, RemoteRecord
from lorakit.sweeps.results import SweepResult
from lorakit.training.agreement import comparable_keys
from lorakit.training.control import stop_request
from lorakit.training.run_json import read_run


def check_processes(sweep: Sweep, ray: str | None) -> None:
    """Raise UserError for what several processes cannot share."""
    if not is_launched():
        return
    check_whole_models("lorakit sweep trains each member in one process")
    if ray is not None:
        raise UserError(
            "--ray cannot be combined with torchrun or accelerate launch; allowed: one of them"
        )
    if sweep.section.halving:
        raise UserError(
            "halving: not supported with several processes, which do not measure the members at "
            "the same time; allowed: without torchrun and accelerate launch"
        )


def is_restarted(sweep: Sweep, say: Say) -> bool:
    """Whether the launcher has started the processes again in place of those of this sweep."""
    launch = launch_id()
    folders = (Path(member.recipe.train.output_dir) for member in sweep.members)
    if launch is None or all(read_run(folder).get("launch") != launch for folder in folders):
        return False
    say("restarted by the launcher: continuing as with --resume")
    return True


def check_agreement(sweep: Sweep) -> None:
    """Raise UserError, in all processes, if the members of one are not the first's."""
    own = [(member.name, comparable_keys(member.recipe)) for member in sweep.members]
    found = gather((platform.node(), own))
    for rank, (host, members) in enumerate(found):
        if members != found[0][1]:
            raise UserError(
                f"{sweep.section.recipe}: the members in process {rank} on {host} are not those of "
                "process 0; hint: start all processes with the same sweep"
            )


def check_visible(sweep: Sweep) -> None:
    """Raise an error if this process does not see what the first has written."""
    if not sweep.record.is_file():
        raise LorakitError(
            f"{sweep.output_dir}: files written by process 0 are not visible on {platform.node()}; "
            "hint: put output_dir on a file system that all hosts share"
        )


def train_shared(sweep: Sweep, result: SweepResult, jobs: Sequence[Job]) -> None:
    """Train the members of ``jobs``, each job in the process that is the first to take it.

    Raises Interrupted after a signal to any process, and ConnectionLost if one was killed, with
    checkpoints of what ran.
    """
    train = _train_as_first if is_first() else _train_as_other
    with alone(), stop_request():
        try:
            train(sweep, result, jobs)
        except ConnectionLost as error:
            raise ConnectionLost(RESUME) from error


def _train_as_first(sweep: Sweep, result: SweepResult, jobs: Sequence[Job]) -> None:
    """Train as the first process, which records what all do."""
    with SweepProgress(result) as progress:
        record = MainRecord(sweep, result, progress)
        try:
            with watch_peers() as watch:
                progress.on_tick = hear = partial(record.take_over, watch)
                _train(sweep, record, jobs, watch, hear)
        except Interrupted as error:
            hear()
            raise record.interrupted(error) from error


def _train_as_other(sweep: Sweep, _result: SweepResult, jobs: Sequence[Job]) -> None:
    with watch_peers() as watch:
        _train(sweep, RemoteRecord(watch), jobs, watch, lambda: None)


def _train(
    sweep: Sweep,
    record: Record,
    jobs: Sequence[Job],
    watch: Watch,
    meanwhile: Callable[[], None],
) -> None:
    runs = MemberRuns(sweep, record)
    for number in watch.claimed(len(jobs)):
        runs.train(jobs[number])
        meanwhile()
    watch.wait(meanwhile)
