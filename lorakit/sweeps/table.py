"""The table of a sweep: a row for each group of members, as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io

from lorakit.errors import decimal, listed, printable
from lorakit.io.atomic import write_text, writing
from lorakit.sweeps.members import SEED, as_text
from lorakit.sweeps.names import short_keys, value_text
from lorakit.sweeps.results import Group, SweepResult
from lorakit.terminal.columns import aligned

_NONE = "-"
_BEST = "*"


def varying_keys(result: SweepResult) -> list[str]:
    """The recipe keys, except for the seed, in which members differ."""
    first = result.settings[0]
    return [
        key
        for key in first
        if key != SEED and len({as_text(own[key]) for own in result.settings}) > 1
    ]


def table_text(result: SweepResult) -> str:
    """The table for a terminal, with the errors of failed members and the best adapter below."""
    lines = [aligned([_titles(result), *_rows(result)], len(varying_keys(result)))]
    lines += _errors(result)
    left = sum(member.status == "pending" for member in result.members)
    if left:
        lines.append(f"pending: {left} of {len(result.members)}")
    if (best := result.best) is not None:
        value = f"{result.metric} {decimal(best.metrics[result.metric])}"
        lines.append(f"best: {best.name}, {value}: {best.adapter_dir}")
    return printable("\n".join(lines))


def _errors(result: SweepResult) -> list[str]:
    """Each error once, with the first member that has it."""
    found: dict[str, list[str]] = {}
    for member in result.members:
        if member.status == "failed":
            found.setdefault(member.error or "", []).append(member.name)
    return [f"failed: {listed(names, most=1)}: {error}" for error, names in found.items()]


def write_tables(result: SweepResult) -> None:
    """Write ``table.md`` and ``table.csv``, atomically."""
    rows = [_titles(result), *_rows(result)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(cells[0]), *cells[1:]]]
    for name, text in (("table.md", "\n".join(lines) + "\n"), ("table.csv", _csv(result))):
        path = result.output_dir / name
        with writing(path):
            write_text(path, printable(text))


def _titles(result: SweepResult) -> list[str]:
    names = short_keys(varying_keys(result))
    return [*names.values(), result.metric, "n", "parameters", "seconds", "best"]


def _rows(result: SweepResult) -> list[list[str]]:
    best = result.best_group
    return [
        [
            *_settings(result, group),
            _score(result, group),
            str(group.n),
            _NONE if (count := _parameters(group)) is None else f"{count:,}",
            _NONE if (seconds := _seconds(group)) is None else f"{seconds:.1f}",
            _BEST if best and group.members == best.members else "",
        ]
        for group in result.groups
    ]


def _settings(result: SweepResult, group: Group) -> list[str]:
    own = result.settings[result.members.index(group.members[0])]
    values = [own[key] for key in varying_keys(result)]
    return [_NONE if value is None else value_text(value) for value in values]


def _score(result: SweepResult, group: Group) -> str:
    if group.mean is not None:
        spread = "" if group.std is None else f" ± {decimal(group.std)}"
        return decimal(group.mean) + spread
    step, score = _stop(result, group)
    return group.members[0].status if score is None else f"{decimal(score)} at step {step}"


def _stop(result: SweepResult, group: Group) -> tuple[int | None, float | None]:
    """The last step at which members were stopped, and the mean of their metric there."""
    stopped = [member for member in group.members if member.stopped_at_step is not None]
    if group.mean is not None or not stopped:
        return None, None
    values = [value for m in stopped if (value := m.stopped_metrics.get(result.metric)) is not None]
    mean = sum(values) / len(values) if values else None
    return max(member.stopped_at_step or 0 for member in stopped), mean


def _parameters(group: Group) -> int | None:
    return next((m.trainable_parameters for m in group.members if m.trainable_parameters), None)


def _seconds(group: Group) -> float | None:
    """The mean over the members."""
    known = [member.seconds for member in group.members if member.seconds is not None]
    return sum(known) / len(known) if known else None


def _csv(result: SweepResult) -> str:
    """Plain numbers, with a column each for mean and standard deviation."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metric = result.metric
    writer.writerow(
        [
            *varying_keys(result),
            metric,
            f"{metric}_std",
            "n",
            "parameters",
            "seconds",
            "best",
            "status",
            "stopped_at_step",
            f"stopped_{metric}",
        ]
    )
    best = result.best_group
    for group in result.groups:
        writer.writerow(
            [
                *_settings(result, group),
                group.mean,
                group.std,
                group.n,
                _parameters(group),
                _seconds(group),
                int(best is not None and group.members == best.members),
                "completed" if group.n else group.members[0].status,
                *_stop(result, group),
            ]
        )
    return text.getvalue()
