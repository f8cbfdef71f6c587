"""What became of the members of a sweep, and ``sweep.json``."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorakit.io.atomic import write_text, writing
from lorakit.sweeps.members import SEED, Member
from lorakit.sweeps.sections import Settings
from lorakit.tasks.base import LOWER_IS_BETTER
from lorakit.training.output_dir import SWEEP_JSON

Status = Literal["pending", "completed", "failed", "stopped"]


@dataclass
class MemberResult:
    """A member and what became of it. ``metrics`` are those of the final evaluation, of the model
    in ``adapter_dir``, ``seconds`` the time of training and its evaluations. ``stopped_at_step``:
    halving stopped it there, because of the ``stopped_metrics``; those of its best step so far,
    whose model it keeps, may be better."""

    name: str
    set: Settings
    status: Status = "pending"
    metrics: dict[str, float] = field(default_factory=dict)
    trainable_parameters: int | None = None
    seconds: float | None = None
    adapter_dir: Path | None = None
    error: str | None = None
    stopped_at_step: int | None = None
    stopped_metrics: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        found = {
            "name": self.name,
            "set": self.set,
            "status": self.status,
            "metrics": self.metrics,
            "trainable_parameters": self.trainable_parameters,
            "seconds": self.seconds,
            "adapter_dir": None if self.adapter_dir is None else str(self.adapter_dir),
            "error": self.error,
        }
        if self.stopped_at_step is not None:
            found["stopped_at_step"] = self.stopped_at_step
            found["stopped_metrics"] = self.stopped_metrics
        return found


@dataclass(frozen=True)
class Group:
    """Members that are equal but for the seed. ``set`` are their settings without it; ``mean`` and
    the sample standard deviation ``std`` are of the sweep's metric over the ``n`` completed
    members, null where there are too few."""

    set: Settings
    members: tuple[MemberResult, ...]
    mean: float | None
    std: float | None
    n: int

    def as_json(self) -> dict[str, Any]:
        return {
            "members": [member.name for member in self.members],
            "set": self.set,
            "mean": self.mean,
            "std": self.std,
            "n": self.n,
        }


class SweepResult:
    """The results of a sweep, complete or not. ``settings`` are, for each member, the values of the
    recipe keys in which members differ."""

    def __init__(self, output_dir: Path, metric: str, members: Sequence[Member]) -> None:
        self.output_dir, self.metric = output_dir, metric
        self.members = [MemberResult(member.name, member.set) for member in members]
        self._groups: dict[str, list[int]] = {}
        for at, member in enumerate(members):
            self._groups.setdefault(member.group, []).append(at)
        flat = [member.recipe.flat() for member in members]
        keys = dict.fromkeys(key for member in members for key in member.set)
        self.settings = [
            {key: row.get(key, member.set.get(key)) for key in keys}
            for row, member in zip(flat, members, strict=True)
        ]

    @property
    def groups(self) -> list[Group]:
        return [
            self._group([self.members[at] for at in places]) for places in self._groups.values()
        ]

    def _group(self, members: list[MemberResult]) -> Group:
        values = [value for member in members if (value := self.value(member)) is not None]
        return Group(
            {key: value for key, value in members[0].set.items() if key != SEED},
            tuple(members),
            statistics.fmean(values) if values else None,
            statistics.stdev(values) if len(values) > 1 else None,
            len(values),
        )

    def value(self, member: MemberResult) -> float | None:
        """The sweep's metric of a completed member."""
        return member.metrics.get(self.metric) if member.status == "completed" else None

    def is_better(self, one: float, other: float) -> bool:
        return self._ascending(one) < self._ascending(other)

    @property
    def best(self) -> MemberResult | None:
        """The best completed member, as training chooses its best model: of equals the one with
        the lowest loss, then the first. None if none has the metric."""
        measured = [member for member in self.members if self.value(member) is not None]
        return min(measured, key=self._order, default=None)

    @property
    def lacks_metric(self) -> bool:
        """Whether members have completed, but none of them has the metric."""
        return self.best is None and any(own.status == "completed" for own in self.members)

    def _order(self, member: MemberResult) -> tuple[float, float]:
        """Sorts completed members, the best first."""
        return self._ascending(member.metrics[self.metric]), member.metrics.get("loss", math.inf)

    def _ascending(self, value: float) -> float:
        return value if self.metric in LOWER_IS_BETTER else -value

    @property
    def best_group(self) -> Group | None:
        """The group with the best mean; of equals the one with the best member, as ``best`` chooses
        it. None if no member has the metric."""
        orders = [
            (self._ascending(group.mean), min(map(self._order, measured)), at)
            for at, group in enumerate(self.groups)
            if group.mean is not None
            and (measured := [own for own in group.members if self.value(own) is not None])
        ]
        return self.groups[min(orders)[2]] if orders else None

    def as_json(self) -> dict[str, Any]:
        """The contents of ``sweep.json``."""
        return {
            "metric": self.metric,
            "members": [member.as_json() for member in self.members],
            "groups": [group.as_json() for group in self.groups],
            "best": None if self.best is None else self.best.name,
        }

    def write(self) -> None:
        """Write ``sweep.json``, atomically."""
        path = self.output_dir / SWEEP_JSON
        with writing(path):
            write_text(path, json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n")
