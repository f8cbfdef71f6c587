"""How a member ended, as its result has it."""

from __future__ import annotations

import traceback
from pathlib import Path

from lorakit.errors import LorakitError, UserError, shown
from lorakit.io.atomic import write_text
from lorakit.sweeps.results import MemberResult
from lorakit.training.run_json import read_record, read_run
from lorakit.user_code import locate_error


def complete(own: MemberResult, folder: Path) -> None:
    """Record what the complete run in ``folder`` has written. Raises UserError if its metrics are
    not finite numbers, as in a damaged file."""
    record, metrics = read_run(folder), read_record(folder).get("metrics") or {}
    if record.get("metrics", {}) != metrics:
        raise UserError(
            f"{folder / 'run.json'}: metrics = {shown(metrics)}: allowed: finite numbers by name; "
            f"hint: restore the file, or delete {folder}, so that the member trains again"
        )
    own.status, own.error = "completed", None
    own.metrics = metrics
    own.trainable_parameters = record.get("trainable_parameters")
    own.seconds = record.get("seconds")
    own.adapter_dir = folder / "adapter"


def fail(own: MemberResult, error: str) -> None:
    own.status, own.error = "failed", error


def describe_failure(error: Exception, folder: Path) -> str:
    """The message of ``error``, of which the traceback goes to a file in ``folder`` if it is a
    bug."""
    if isinstance(error, LorakitError):
        return str(error).replace("resume with --resume auto", "resume with --resume")
    file = folder / "traceback.log"
    reason = locate_error(error) or traceback.format_exception_only(error)[-1].strip()
    write_text(file, "".join(traceback.format_exception(error)))
    return f"{reason.splitlines()[0]}; the traceback is in {file}"
