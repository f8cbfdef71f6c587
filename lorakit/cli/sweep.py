"""``sweep``: train many members of one recipe, and compare them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.console import AsJson, Overrides, echo, only_results, say
from lorakit.errors import Interrupted, counted

if TYPE_CHECKING:
    from lorakit.api import Sweep, SweepPlan, SweepResult

_File = Annotated[
    Path, typer.Argument(metavar="SWEEP|RECIPE", help="Sweep file, or with --grid a recipe.")
]
_Grid = Annotated[
    list[str] | None,
    typer.Option(
        "--grid", metavar="KEY=V1,V2", help="Values of a recipe key to combine. Can be repeated."
    ),
]
_OutputDir = Annotated[
    str | None,
    typer.Option(
        "--output-dir",
        metavar="DIR",
        help="Override output_dir [default with --grid: train.output_dir of the recipe + -sweep].",
    ),
]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the sweep in the output directory, if any.")
]
_DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="List the members and how they would run; write nothing."),
]
_Joint = Annotated[
    str | None,
    typer.Option(
        metavar="auto|true|false",
        help="Train members together over one frozen base: where possible (auto), all (true) or "
        "none (false).",
    ),
]
_Halving = Annotated[
    bool,
    typer.Option("--halving", help="Stop the worse half after 1/4 and 1/2 of the steps."),
]
_Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Train the members on a Ray cluster; local is this machine's GPUs.",
    ),
]
_Metric = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Metric to compare by [default: the task's main metric]."),
]


def sweep(
    file: _File,
    grid: _Grid = None,
    overrides: Overrides = None,
    output_dir: _OutputDir = None,
    metric: _Metric = None,
    joint: _Joint = None,
    halving: _Halving = False,
    resume: _Resume = False,
    dry_run: _DryRun = False,
    ray: _Ray = None,
    as_json: AsJson = False,
) -> None:
    """Train a recipe with many settings, and compare them.

    Writes sweep.json, table.md, table.csv, plots and a run directory for each member to output_dir.
    The exit code is 1 if a member failed, or if none measured the metric. See docs/sweep.md for the
    keys of a sweep file. Under torchrun or accelerate launch, the processes share the members.

    Example: lorakit sweep recipes/sweeps/rank.yaml

    Example: lorakit sweep recipe.yaml --grid adapter.r=1,8,64
    """
    from lorakit import api

    options: dict[str, Any] = {
        "--output-dir": output_dir,
        "--metric": metric,
        "--halving": halving or None,
        "--joint": {"true": True, "false": False, "auto": "auto"}.get((joint or "").lower(), joint),
    }
    with api.process_group():
        with only_results():
            loaded = api.load_sweep(
                file, grid=grid or (), overrides=overrides or (), options=options
            )
            plan = api.plan_sweep(loaded, resume, say, ray=ray) if dry_run else None
            result = _run(loaded, resume, ray) if plan is None else None
        if api.is_main():
            _print(plan, result, as_json)
    if plan is not None:
        failed = any(planned.error for planned in plan.members)
    elif result is not None:
        failed = result.lacks_metric or any(own.status == "failed" for own in result.members)
    if failed:
        raise typer.Exit(1)


def _run(loaded: Sweep, resume: bool, ray: str | None) -> SweepResult:
    """Train the members; after a signal, say the command that resumes it."""
    from lorakit import api

    try:
        return api.sweep(loaded, resume, say, ray=ray)
    except Interrupted as error:
        if api.is_launched():  # with a command that is not known here
            raise
        command = ["lorakit", "sweep", str(loaded.record), "--resume"]
        command += ["--ray", ray] if ray else []
        advice = f"resume with: {shlex.join(command)}"
        raise Interrupted(error.problem, error.signal_number, advice) from error


def _print(plan: SweepPlan | None, result: SweepResult | None, as_json: bool) -> None:
    if plan is not None:
        _print_plan(plan, as_json)
    elif result is not None:
        _print_result(result, as_json)


def _print_plan(plan: SweepPlan, as_json: bool) -> None:
    if as_json:
        echo(json.dumps(plan.as_json(), indent=2))
        return
    width = max(len(member.name) for member in plan.members)
    for member in plan.members:
        count = member.trainable_parameters
        what = f"{count:>12,} parameters" if count is not None else f"fails: {member.error}"
        echo(f"{member.name:<{width}}  {what}")
    for number, (names, reason) in enumerate(plan.jobs, 1):
        together = f"{len(names)} members together: {names[0]} to {names[-1]}"
        echo(f"job {number}: {f'{names[0]} alone: {reason}' if reason else together}")
    members = counted(len(plan.members), "member")
    echo(f"{members}, compared by {plan.metric}, in {plan.output_dir}")


def _print_result(result: SweepResult, as_json: bool) -> None:
    from lorakit.api import table_text

    if as_json:
        echo(json.dumps(result.as_json(), indent=2, allow_nan=False))
    else:
        echo(table_text(result))
