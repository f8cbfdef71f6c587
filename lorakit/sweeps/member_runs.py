"""The runs of members in one process, and on a cluster."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from lorakit.errors import Interrupted
from lorakit.notes import Say
from lorakit.sweeps.cluster import TaskResult, train_on_cluster
from lorakit.sweeps.halving import Halving
from lorakit.sweeps.jobs import Job
from lorakit.sweeps.load import Sweep
from lorakit.sweeps.outcome import describe_failure
from lorakit.sweeps.record import MainRecord, Record
from lorakit.training.joint import train_joint
from lorakit.training.run import train
from lorakit.training.session import RunResult


class MemberRuns:
    """Trains the members of a sweep in this process; ``record`` learns how they are doing."""

    def __init__(self, sweep: Sweep, record: Record, halving: Halving | None = None) -> None:
        self._sweep, self._members = sweep, sweep.members
        self._record, self._halving = record, halving

    def train(self, job: Job) -> None:
        """Train the members of a job. Raises Interrupted after a signal."""
        if job.reason is None:
            self._together(job.members)
        else:
            self._alone(job.members[0])
        _release_memory()

    def _alone(self, at: int) -> None:
        member = self._members[at]
        self._record.started(at)
        try:
            train(
                member.recipe, "auto", self._say_of(at), self._record.display(at),
                stop_at=None if self._halving is None else partial(self._stops, [at], 0),
            )  # fmt: skip
        except Interrupted as error:
            raise Interrupted(f"{member.name}: {error.problem}", error.signal_number) from error
        except Exception as error:
            self._record.ended(at, describe_failure(error, self._folder(at)))
        else:
            self._record.ended(at, None)

    def _together(self, numbers: Sequence[int]) -> None:
        """Train jointly; if that fails as a whole, what has not ended is trained alone."""
        left = set(numbers)

        def finished(index: int, outcome: RunResult | Exception) -> None:
            at = numbers[index]
            left.discard(at)
            if isinstance(outcome, Exception):
                self._record.ended(at, describe_failure(outcome, self._folder(at)))
            else:
                self._record.ended(at, None)

        for at in numbers:
            self._record.started(at)
        if self._halving is not None:
            self._halving.align({self._members[at].name: self._folder(at) for at in numbers})
        try:
            train_joint(
                [self._members[at].recipe for at in numbers], "auto", self._record.say, finished,
                stop_at=None if self._halving is None else partial(self._stops, numbers),
                say_of=lambda index: self._say_of(numbers[index]),
                display_of=lambda index: self._record.display(numbers[index]),
            )  # fmt: skip
        except Interrupted as error:
            raise Interrupted("interrupted", error.signal_number) from error
        except Exception as error:
            self._record.say(
                f"joint training failed: {describe_failure(error, self._sweep.output_dir)}; "
                "training what is left one after another"
            )
        # Not in the block above: the frames of its error refer to what was on the device.
        if left:
            _release_memory()
            for at in sorted(left):
                self._alone(at)

    def train_on_cluster(self, numbers: Sequence[int], address: str, record: MainRecord) -> None:
        """Train single members on the cluster at ``address``. Raises Interrupted after a signal."""

        def started(index: int) -> None:
            record.started_elsewhere(numbers[index])

        def ended(index: int, told: TaskResult) -> None:
            for note in told.notes:
                record.note(numbers[index], note)
            record.ended(numbers[index], told.error)

        members = [self._members[at] for at in numbers]
        train_on_cluster(members, address, record.say, started, ended)

    def _stops(self, numbers: Sequence[int], index: int, step: int, _metrics: object) -> bool:
        assert self._halving is not None
        return self._halving.stops(self._members[numbers[index]].name, step)

    def _say_of(self, at: int) -> Say:
        return partial(self._record.note, at)

    def _folder(self, at: int) -> Path:
        return Path(self._members[at].recipe.train.output_dir)


def _release_memory() -> None:
    """Free what a run leaves in cycles, before the next one allocates as much."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
