"""The data of a page's charts: which curves each chart has, and their points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.reports.metrics_log import as_columns, thinned
from lorakit.reports.runs import Run

#: Ranges of steps that a curve of up to _FULL_RUNS runs is thinned out to; of more runs, fewer.
_BUCKETS, _FULL_RUNS, _FEWEST_BUCKETS = 300, 8, 40

#: Charts with more than one curve, or with a unit: title, unit, the curves' names with what tells
#: them apart. All other numbers have a chart of their own.
_CHARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "", {"loss": "training", "eval.loss": "evaluation"}),
    ("Learning rate", "", {"learning_rate": "all but B", "learning_rate_B": "B"}),
    ("Gradient norm", "before clipping", {"grad_norm": ""}),
    ("Throughput", "tokens/s", {"tokens_per_second": ""}),
    ("Peak memory", "GiB", {"peak_memory_bytes": ""}),
    ("Rank budget", "sum of ranks", {"budget": ""}),
    ("Orthogonality penalty", "", {"orthogonality_loss": ""}),
)
#: Positive over several orders of magnitude: drawn logarithmically if the reader chooses so.
_LOGARITHMIC = frozenset({"Loss", "Gradient norm", "Orthogonality penalty"})
#: Noisy from step to step, so that the reader may smooth them.
_SMOOTHED = frozenset({"Loss", "Gradient norm", "Throughput", "Orthogonality penalty"})
#: Numbers without a chart.
_HIDDEN = frozenset({"epoch", "eval.perplexity"})  # exp of the loss
_SCALES = {"peak_memory_bytes": 2**-30}


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The charts that have data, in order: the loss, evaluations, then all else.

    Each has ``title``, ``unit``, whether it may be drawn with a ``log`` axis or be smoothed
    (``smooth``), and ``curves``: ``run`` (its number), ``label``, ``style`` (0 for the chart's
    first name, 1 for the second), ``points`` (evaluations are few, and drawn as points), ``x`` and
    ``y``; with ``mx`` and ``my``, means, if the curve is thinned out.
    """
    names = dict.fromkeys(name for run in runs for name in run.log.curves)
    grouped = {name for _, _, curves in _CHARTS for name in curves}
    others = [name for name in names if name not in grouped and name not in _HIDDEN]
    evaluations = [_own_chart(name) for name in others if name.startswith("eval.")]
    rest = [_own_chart(name) for name in others if not name.startswith("eval.")]
    loss, *later = _CHARTS
    found = []
    for title, unit, labels in (loss, *evaluations, *later, *rest):
        curves = [
            {"run": at, "label": label, "style": style} | _curve(run, name, len(runs))
            for at, run in enumerate(runs)
            for style, (name, label) in enumerate(labels.items())
            if name in run.log.curves
        ]
        if curves:
            flags = {"log": title in _LOGARITHMIC, "smooth": title in _SMOOTHED}
            found.append({"title": title, "unit": unit, "curves": curves} | flags)
    return found


def _own_chart(name: str) -> tuple[str, str, dict[str, str]]:
    title = name.removeprefix("eval.").replace("_", " ")
    unit = "evaluation" if name.startswith("eval.") else ""
    return title[:1].upper() + title[1:], unit, {name: ""}


def _curve(run: Run, name: str, runs: int) -> dict[str, Any]:
    buckets = max(_FEWEST_BUCKETS, _BUCKETS * _FULL_RUNS // max(_FULL_RUNS, runs))
    scale = _SCALES.get(name, 1)
    points = [(step, value * scale) for step, value in run.log.curves[name]]
    extremes, means = thinned(points, buckets)
    x, y = as_columns(extremes)
    found: dict[str, Any] = {"points": name.startswith("eval."), "x": x, "y": y}
    if means:
        found["mx"], found["my"] = as_columns(means)
    return found
