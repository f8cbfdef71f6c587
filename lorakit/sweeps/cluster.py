"""Trains the members of a sweep as tasks of Ray, each on a GPU of the cluster if it has any.

Needs the extra ``ray``. The machines of a cluster share the output directory and have lorakit.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorakit.errors import Interrupted, UserError
from lorakit.notes import Say
from lorakit.recipe.load import load_recipe
from lorakit.sweeps.load import Sweep
from lorakit.sweeps.members import Member
from lorakit.sweeps.outcome import describe_failure
from lorakit.training.control import stop_request
from lorakit.training.run import train
from lorakit.training.run_json import read_run
from lorakit.training.tracking import Display

#: An address that stands for a cluster of this machine alone, for the time of the sweep.
LOCAL = "local"
_ADDRESSES = "local, auto, or HOST:PORT of a cluster"
_SECONDS_PER_LOOK = 0.5
_SECONDS_TO_CONNECT = 10.0


@dataclass
class TaskResult:
    """What a Ray task returns about its member: the run's notes, and why it failed or was
    interrupted. ``error`` and ``interrupted`` are None if it completed."""

    notes: list[str] = field(default_factory=list)
    error: str | None = None
    interrupted: str | None = None


def check_ray(sweep: Sweep) -> None:
    """Raise UserError if Ray is not installed, or cannot train the members of ``sweep``."""
    if sweep.section.halving:
        raise UserError("--ray cannot be combined with halving, which compares running members")
    if find_spec("ray") is None:
        raise UserError("--ray needs Ray; hint: pip install 'lorakit[ray]'")


def train_on_cluster(
    members: Sequence[Member],
    address: str,
    say: Say,
    started: Callable[[int], None],
    ended: Callable[[int, TaskResult], None],
) -> None:
    """Train ``members`` on the cluster at ``address``; ``started`` and ``ended`` get a member's
    number. Raises UserError if there is no cluster, and Interrupted after a signal, when each
    running member has saved a checkpoint."""
    import ray

    with _cluster(address) as resources, stop_request() as stop:
        gpus = 1 if resources.get("GPU", 0) >= 1 else 0
        say(f"ray: {resources.get('GPU', 0):g} GPUs, {resources.get('CPU', 0):g} CPU cores")
        task = ray.remote(num_gpus=gpus)(_train_in_task)
        files = [str(Path(m.recipe.train.output_dir, "recipe.yaml")) for m in members]
        running = {task.remote(file, str(Path.cwd())): at for at, file in enumerate(files)}
        waiting, cancelled = set(running.values()), False
        while running:
            done, _ = ray.wait(list(running), timeout=_SECONDS_PER_LOOK)
            for at in [at for at in waiting if _has_started(members[at])]:
                waiting.discard(at)
                started(at)
            for reference in done:
                at = running.pop(reference)
                waiting.discard(at)
                if (result := _result(reference)) is not None and result.interrupted is None:
                    ended(at, result)
            if stop and not cancelled:
                cancelled = True
                for reference in running:
                    ray.cancel(reference)
        if stop:
            raise Interrupted("interrupted", stop.signal_number)


@contextmanager
def _cluster(address: str) -> Iterator[dict[str, float]]:
    """Connect to a cluster, and yield its resources."""
    import ray

    _check_address(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        options["include_dashboard"] = False
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"--ray {address}: {first}; allowed: {_ADDRESSES}") from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise UserError if nobody listens at ``HOST:PORT``, for which Ray would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--ray {address}: {error}; allowed: {_ADDRESSES}") from error


def _result(reference: Any) -> TaskResult | None:
    """What a task returned; None if it was cancelled before it started."""
    import ray

    try:
        result: TaskResult = ray.get(reference)
    except ray.exceptions.TaskCancelledError:
        return None
    except ray.exceptions.RayError as error:
        return TaskResult(error=f"ray: {str(error).strip().splitlines()[0]}")
    return result


def _has_started(member: Member) -> bool:
    folder = Path(member.recipe.train.output_dir)
    return (folder / "run.json").is_file() and "exit_reason" not in read_run(folder)


def _train_in_task(file: str, directory: str) -> TaskResult:
    """Train the recipe ``file``, which ``directory`` is the working directory of; runs in a process
    of the cluster."""
    os.chdir(directory)
    result = TaskResult()
    recipe = load_recipe(file)
    try:
        train(recipe, "auto", result.notes.append, _quiet)
    except Interrupted as error:
        result.interrupted = str(error)
    except Exception as error:
        result.error = describe_failure(error, Path(recipe.train.output_dir))
    return result


def _quiet(total_steps: int, done: int) -> Display:
    return Display(total_steps, done, quiet=True)
