"""``lorakit sweep``: train the members, and compare them."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorakit.distributed.launcher import is_launched
from lorakit.errors import Interrupted, LorakitError, UserError
from lorakit.io.atomic import write_text
from lorakit.pipeline.task_data import Say
from lorakit.sweeps.directory import exclusive_sweep
from lorakit.sweeps.load import Sweep, load_sweep, located
from lorakit.sweeps.members import Member
from lorakit.sweeps.metric import sweep_metric
from lorakit.sweeps.plots import draw
from lorakit.sweeps.progress import SweepProgress
from lorakit.sweeps.results import MemberResult, SweepResult
from lorakit.sweeps.size import Sizes, with_budget
from lorakit.sweeps.table import write_tables
from lorakit.training.run import train
from lorakit.training.run_json import read_record
from lorakit.training.session import RunResult
from lorakit.user_code import locate_error


def sweep(
    sweep: Sweep | str | Path | Mapping[str, Any],
    resume: bool = False,
    say: Say = lambda text: None,
) -> SweepResult:
    """Train the members of a sweep: a sweep file, a mapping with its keys, or a loaded one.

    A member that fails does not end the others: its result has the error. ``resume`` continues a
    sweep in its output directory, or starts it; members that are complete are kept, and others
    continue from their checkpoints. Raises UserError before anything is written, and Interrupted
    after a signal, with a checkpoint of the member that ran.
    """
    checked = sweep if isinstance(sweep, Sweep) else load_sweep(sweep)
    with located(checked):
        return _sweep(checked, resume, say)


def _sweep(loaded: Sweep, resume: bool, say: Say) -> SweepResult:
    check_launch()
    loaded = with_budget(loaded, Sizes(), say)
    result = SweepResult(loaded.output_dir, sweep_metric(loaded), loaded.members)
    with exclusive_sweep(loaded, resume):
        result.write()
        with SweepProgress(result) as progress:
            for member, own in zip(loaded.members, result.members, strict=True):
                _train_alone(member, own, result, progress)
        write_tables(result)
        draw(result, list(loaded.section.grid), say)
    if result.best is None and any(own.status == "completed" for own in result.members):
        say(f"no member measured {result.metric}, so that they cannot be compared")
    return result


def check_launch() -> None:
    """Raise UserError under a launcher."""
    if is_launched():
        raise UserError(
            "lorakit sweep runs in one process; hint: without torchrun or accelerate launch"
        )


def _train_alone(
    member: Member, own: MemberResult, result: SweepResult, progress: SweepProgress
) -> None:
    progress.started(own)
    say, display = partial(progress.note, member.name), progress.display(member.name)
    try:
        run = train(member.recipe, "auto", say, display)
    except Interrupted as error:
        raise _interrupted(member, result, error) from error
    except Exception as error:
        fail(own, member, error)
    else:
        complete(own, run)
    result.write()
    progress.ended(own)
    _release_memory()


def _interrupted(member: Member, result: SweepResult, error: Interrupted) -> Interrupted:
    done = sum(own.status != "pending" for own in result.members)
    text = str(error).removesuffix("; continue with --resume auto")
    return Interrupted(
        f"{member.name}: {text}; {done} of {len(result.members)} members have ended; continue "
        "with --resume",
        error.exit_code - 128,
    )


def complete(own: MemberResult, run: RunResult) -> None:
    """Record that a member has been trained."""
    record = read_record(run.output_dir)
    own.status, own.metrics, own.adapter_dir = "completed", run.metrics, run.adapter_dir
    own.trainable_parameters = record.get("trainable_parameters")
    own.seconds = record.get("seconds")


def fail(own: MemberResult, member: Member, error: Exception) -> None:
    """Record that a member has failed; the traceback of a bug goes to a file."""
    own.status, own.error = "failed", str(error)
    if not isinstance(error, LorakitError):
        file = Path(member.recipe.train.output_dir, "traceback.log")
        reason = locate_error(error) or traceback.format_exception_only(error)[-1].strip()
        own.error = f"{reason.splitlines()[0]}; the traceback is in {file}"
        write_text(file, "".join(traceback.format_exception(error)))


def _release_memory() -> None:
    """Free what a run leaves in cycles, before the next one allocates as much."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
