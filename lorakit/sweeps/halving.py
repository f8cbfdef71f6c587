"""Successive halving: at set points, members whose settings are in the worse half stop."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.io.atomic import write_text, writing
from lorakit.sweeps.results import MemberResult, SweepResult
from lorakit.sweeps.sections import step_of
from lorakit.tasks.base import LOWER_IS_BETTER
from lorakit.training.checkpoint import checkpoints, delete_after
from lorakit.training.output_dir import SWEEP_JSON
from lorakit.training.run_json import read_json, read_run

HALVING_JSON = "halving.json"


@dataclass
class Course:
    """The metrics and the ``steps`` of the ``evaluations`` at which a member reached the points;
    the number of points that it has ``passed``; and where it was stopped."""

    evaluations: list[dict[str, float]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    passed: int = 0
    stopped_at_step: int | None = None


class Halving:
    """Decides which members stop. The course of each is kept in ``halving.json``, so that a resumed
    sweep decides the same.

    A member is measured at its first evaluation at or after each of ``points``, steps or fractions
    of its run; the last evaluation does not count. It continues if the mean of its group, members
    that are equal but for the seed, is in the better half of the groups that have been measured
    there so far; of equal means, the one with the lower loss is better. Members that train together
    are measured at the same time.

    Raises UserError if the file cannot be read, or lacks a member that was stopped.
    """

    def __init__(self, points: Sequence[float], result: SweepResult) -> None:
        self._points, self._result = points, result
        self._file = result.output_dir / HALVING_JSON
        self._totals: dict[str, int] = {}
        self._courses = {member.name: Course() for member in result.members}
        found = _read(self._file) if self._file.exists() else {}
        self._courses |= {name: own for name, own in found.items() if name in self._courses}
        for name in _earlier_stops(result.output_dir):
            if name in self._courses and self._courses[name].stopped_at_step is None:
                raise UserError(
                    f"{self._file}: does not have the member {name}, which was stopped; hint: "
                    "restore the file, or start the sweep in another directory"
                )

    @property
    def has_measured(self) -> bool:
        """Whether a member has been measured at a point."""
        return any(course.evaluations for course in self._courses.values())

    def started(self, name: str, total_steps: int) -> None:
        """A member's run has so many steps."""
        self._totals[name] = total_steps

    def evaluated(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """A member has been evaluated."""
        total, course = self._totals[name], self._courses[name]
        while (
            step < total
            and len(course.steps) < len(self._points)
            and step >= step_of(self._points[len(course.steps)], total)
        ):
            course.evaluations.append(dict(metrics))
            course.steps.append(step)
            self._write()

    def stops(self, name: str, step: int) -> bool:
        """Whether a member stops after ``step``. To be asked after each evaluation, and when a run
        resumes, which may be before the step of its last score."""
        course = self._courses[name]
        while course.stopped_at_step is None and course.passed < len(course.steps):
            if step < course.steps[course.passed]:
                break
            if self._is_better_half(name, course.passed):
                course.passed += 1
            else:
                course.stopped_at_step = step
            self._write()
        return course.stopped_at_step is not None and step >= course.stopped_at_step

    def record(self, member: MemberResult) -> None:
        """Mark a member that has ended as stopped, if it was."""
        course = self._courses[member.name]
        if course.stopped_at_step is not None and member.status == "completed":
            member.status, member.stopped_at_step = "stopped", course.stopped_at_step
            if course.passed < len(course.evaluations):
                member.stopped_metrics = course.evaluations[course.passed]

    def align(self, folders: Mapping[str, Path]) -> None:
        """Let members that are to train together, in ``folders``, resume from the same step, so
        that they are measured at the same time: delete later checkpoints."""
        running = {
            name: folder / "checkpoints"
            for name, folder in folders.items()
            if read_run(folder).get("exit_reason") not in ("completed", "failed")
        }
        steps = [_newest_step(folder) for folder in running.values()]
        for folder in running.values():
            delete_after(folder, min(steps))

    def _is_better_half(self, name: str, point: int) -> bool:
        means: list[tuple[float, float, int, bool]] = []
        for group in self._result.groups:
            courses = [self._courses[member.name] for member in group.members]
            measured = [c.evaluations[point] for c in courses if len(c.evaluations) > point]
            if measured:
                own = any(member.name == name for member in group.members)
                mean = statistics.fmean(map(self._ascending, measured))
                loss = statistics.fmean(metrics.get("loss", 0.0) for metrics in measured)
                means.append((mean, loss, len(means), own))
        kept = sorted(means)[: math.ceil(len(means) / 2)]
        return any(own for *_, own in kept)

    def _ascending(self, metrics: Mapping[str, float]) -> float:
        """The sweep's metric, or the loss if that is measured at the end only; the lower the
        better."""
        metric = self._result.metric if self._result.metric in metrics else "loss"
        return metrics[metric] if metric in LOWER_IS_BETTER else -metrics[metric]

    def _write(self) -> None:
        with writing(self._file):
            courses = {name: asdict(course) for name, course in self._courses.items()}
            write_text(self._file, json.dumps(courses, indent=1) + "\n")


def _read(file: Path) -> dict[str, Course]:
    try:
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        courses = {name: Course(**course) for name, course in stored.items()}
        if not all(map(_is_valid, courses.values())):
            raise ValueError("a value has another type")
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{file}: cannot be read ({type(error).__name__}); hint: restore it, or start the "
            "sweep in another directory"
        ) from error
    return courses


def _is_valid(course: Course) -> bool:
    counts = [*course.steps, course.passed, course.stopped_at_step or 0]
    metrics = [value for own in course.evaluations for value in own.values()]
    return (
        len(course.evaluations) == len(course.steps)
        and all(type(count) is int and count >= 0 for count in counts)
        and all(type(value) in (int, float) and math.isfinite(value) for value in metrics)
        and course.passed <= len(course.steps)
    )


def _earlier_stops(output_dir: Path) -> list[str]:
    """The names of the members that were stopped in the sweep that is resumed."""
    members = read_json(output_dir / SWEEP_JSON).get("members")
    own = [m for m in members if isinstance(m, dict)] if isinstance(members, list) else []
    return [m["name"] for m in own if "stopped_at_step" in m and isinstance(m.get("name"), str)]


def _newest_step(folder: Path) -> int:
    found = checkpoints(folder)
    return int(found[-1].name.removeprefix("step-")) if found else 0
