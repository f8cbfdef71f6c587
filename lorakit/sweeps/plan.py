"""How the members of a sweep would run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.distributed.group import init_process_group
from lorakit.distributed.processes import run_on_main
from lorakit.errors import UserError
from lorakit.notes import Say, silent
from lorakit.sweeps.check import halving_note
from lorakit.sweeps.cluster import check_ray
from lorakit.sweeps.directory import check_directory
from lorakit.sweeps.jobs import make_jobs
from lorakit.sweeps.load import Sweep, load_sweep, located
from lorakit.sweeps.members import Member
from lorakit.sweeps.metric import sweep_metric
from lorakit.sweeps.sections import Settings
from lorakit.sweeps.shared import check_processes
from lorakit.sweeps.size import Sizes, with_budget


@dataclass(frozen=True)
class PlannedMember:
    """``error`` is why the member would fail; None if no problem was found."""

    name: str
    set: Settings
    trainable_parameters: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep would do: ``jobs``, one after another, each with the names of its members, and
    of a single member the reason why it trains alone."""

    output_dir: Path
    metric: str
    members: tuple[PlannedMember, ...]
    jobs: tuple[tuple[tuple[str, ...], str | None], ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.output_dir),
            "metric": self.metric,
            "members": [asdict(member) for member in self.members],
            "jobs": [{"members": list(n), "reason": reason} for n, reason in self.jobs],
        }


def plan_sweep(
    sweep: Sweep | str | Path | Mapping[str, Any],
    resume: bool = False,
    say: Say = silent,
    *,
    ray: str | None = None,
) -> SweepPlan:
    """Describe what ``sweep`` would do, without writing anything. Raises UserError as it does, but
    does not connect to the cluster ``ray``."""
    checked = sweep if isinstance(sweep, Sweep) else load_sweep(sweep)
    init_process_group()
    with located(checked):
        check_processes(checked, ray)
        if ray is not None:
            check_ray(checked)
        return run_on_main(lambda: _plan(checked, resume, say))


def _plan(loaded: Sweep, resume: bool, say: Say) -> SweepPlan:
    sizes = Sizes()
    loaded = with_budget(loaded, sizes, say)
    check_directory(loaded, resume)
    if note := halving_note(loaded.section, loaded.members):
        say(note)
    members = tuple(_planned(member, sizes) for member in loaded.members)
    found = make_jobs(loaded.members, loaded.section)
    jobs = tuple(
        (tuple(loaded.members[at].name for at in job.members), job.reason) for job in found
    )
    return SweepPlan(loaded.output_dir, sweep_metric(loaded), members, jobs)


def _planned(member: Member, sizes: Sizes) -> PlannedMember:
    try:
        count = sizes.count(member.recipe)
    except UserError as error:
        return PlannedMember(member.name, member.set, error=str(error))
    return PlannedMember(member.name, member.set, count)
