"""Reading ``metrics.jsonl``, also while a run is writing it, and thinning out its curves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: (step, value)
Point = tuple[int, float]
#: A file with more names has not been written by a run.
_MOST_NAMES = 40
#: Nor one with larger numbers, which would overflow in sums and means.
_LARGEST = 1e100


@dataclass
class MetricsLog:
    """The numbers of ``metrics.jsonl`` by name: of log lines and, as ``eval.NAME``, of evaluations.
    ``ranks`` are (step, the rank of each adapted matrix); ``unreadable_lines`` counts lines that
    are not what a run writes, without a last one that is not complete yet."""

    curves: dict[str, list[Point]] = field(default_factory=dict)
    ranks: list[tuple[int, list[int]]] = field(default_factory=list)
    unreadable_lines: int = 0

    @property
    def last_step(self) -> int:
        return max((points[-1][0] for points in self.curves.values()), default=0)


def read_metrics(file: Path) -> MetricsLog:
    """Read the complete lines of ``file``; nothing if there is no such file."""
    log = MetricsLog()
    for text in _complete_lines(file):
        if not _add_line(log, text):
            log.unreadable_lines += 1
    return log


def _complete_lines(file: Path) -> Iterator[bytes]:
    try:
        if not file.is_file():  # reading from a pipe might never end
            return
        with file.open("rb") as lines:
            yield from (line for line in lines if line.endswith(b"\n") and line.strip())
    except OSError:
        return


def _add_line(log: MetricsLog, text: bytes) -> bool:
    """Add the numbers of a line; false if it has no step."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return False
    step = line.get("step") if isinstance(line, dict) else None
    if type(step) is not int or not 0 <= step < _LARGEST:
        return False
    ranks = line.pop("ranks", None)
    if isinstance(ranks, list) and ranks and all(map(is_rank, ranks)):
        log.ranks.append((step, ranks))
    scores = line.pop("eval", None)
    if isinstance(scores, dict):
        line |= {f"eval.{name}": value for name, value in scores.items()}
    for name, value in line.items():
        known = name in log.curves or len(log.curves) < _MOST_NAMES
        if name != "step" and known and (number := as_number(value)) is not None:
            log.curves.setdefault(name, []).append((step, number))
    return True


def is_rank(value: Any) -> bool:
    """Whether ``value`` can be the rank of a matrix."""
    return type(value) is int and 0 <= value < _LARGEST


def as_number(value: Any) -> float | None:
    """``value`` if it is a number that a run can have written."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -_LARGEST < value < _LARGEST else None


def thinned(points: Sequence[Point], buckets: int) -> tuple[list[Point], list[Point]]:
    """At most two points of each of so many ranges of steps, its lowest and its highest, so that
    no peak is lost; and the mean of each range. Short curves remain as they are, without means."""
    if len(points) <= 2 * buckets:
        return list(points), []
    extremes: list[Point] = []
    means: list[Point] = []
    for number in range(buckets):
        own = points[number * len(points) // buckets : (number + 1) * len(points) // buckets]
        lowest, highest = (find(own, key=lambda point: point[1]) for find in (min, max))
        extremes += sorted({lowest, highest})
        middle = own[len(own) // 2][0]
        means.append((middle, math.fsum(value / len(own) for _, value in own)))
    return extremes, means


def as_columns(points: Iterable[Point]) -> tuple[list[int], list[float]]:
    """The steps, and the values with as many digits as a chart can show."""
    pairs = [(step, float(f"{value:.6g}")) for step, value in points]
    return [step for step, _ in pairs], [value for _, value in pairs]
