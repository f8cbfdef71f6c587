"""Draws a sweep: its metric against each axis of the grid, as PNG and SVG.

Needs matplotlib, from the extra ``plots``. The colors are those of Okabe and Ito, which remain
distinct in gray and to the color-blind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from lorakit.errors import printable
from lorakit.figures import COLORS, color_and_marker, figure_style, save_figure
from lorakit.io.atomic import writing
from lorakit.notes import Say
from lorakit.sweeps.members import METHOD, SEED, as_text
from lorakit.sweeps.names import safe_name, short_keys, value_text
from lorakit.sweeps.results import SweepResult
from lorakit.sweeps.sections import Settings
from lorakit.tasks.base import LOWER_IS_BETTER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Keys whose values are compared by their ratios.
_LOGARITHMIC = ("learning_rate", "r", "target_r", "init_r", "lora_alpha", "per_device_batch_size")
#: A key whose values are drawn on the axis of another: AdaLoRA's rank at the end, beside LoRA's.
_SAME_AXIS = {"adapter.r": "adapter.target_r"}
#: The ratio of the largest to the smallest value above which any axis is logarithmic.
_WIDE = 20
#: The share of full fine-tuning's score that defines the intrinsic dimension (Aghajanyan et al.
#: 2020, arXiv 2012.13255), and the axis that it is read from.
_SHARE, _DIMENSION = 0.9, "adapter.d"
#: How many characters a row of the legend has room for.
_LEGEND = 70
#: The most ticks of numbers, and the most characters of another value at a tick.
_MOST_TICKS, _TICK = 10, 24
_STOPPED = "hollow: stopped by halving"

#: A value of an axis and the metric, and such points of completed and of stopped members.
_Point = tuple[Any, float]
_Points = tuple[list[_Point], list[_Point]]


@dataclass(frozen=True)
class Line:
    """The metric at some values of an axis: the mean, and the standard deviation over members with
    the same settings but for the seed, or over all that have the value. Without ``values``: that of
    members to which the axis does not apply. ``stopped``: value and metric of each member that
    halving stopped, where it was stopped."""

    label: str
    values: tuple[Any, ...]
    means: tuple[float, ...]
    spreads: tuple[float, ...]
    stopped: tuple[tuple[Any, float], ...] = ()


def draw(result: SweepResult, axes: Sequence[str], say: Say) -> None:
    """Draw the metric against each of ``axes``, the keys of the grid, into ``plots/``; against the
    seed only if there is no other. Members that halving stopped are hollow points at the metric
    where they were stopped; failed and pending ones are left out."""
    drawn = [key for key in axes if key != SEED] or list(axes)
    lines = {key: axis_lines(result, key, drawn) for key in drawn}
    if not any(lines.values()):
        return
    if find_spec("matplotlib") is None:
        say("plots need matplotlib; hint: pip install 'lorakit[plots]', then --resume")
        return
    folder = result.output_dir / "plots"
    with figure_style(marker_size=4), writing(folder):
        folder.mkdir(exist_ok=True)
        for key, name in short_keys(drawn).items():
            if lines[key]:
                levels = axis_levels(result, key, drawn)[: max(0, len(COLORS) - len(lines[key]))]
                values = _drawn_values(result, key, lines[key])
                figure = _figure(lines[key], levels, values, key, result.metric)
                save_figure(figure, folder / safe_name(name))


def axis_lines(result: SweepResult, key: str, axes: Sequence[str]) -> list[Line]:
    """A line for each combination of the values of the other ``axes``, and of what the explicit
    members set beside them; if these are more than there are colors, one over all other axes."""
    others = [axis for axis in axes if axis not in (key, SEED)]
    short = short_keys(axes)
    found: dict[tuple[str, str], _Points] = {}
    for member, own in zip(result.members, result.settings, strict=True):
        is_stopped, place = member.status == "stopped", _place(member.set, key)
        value = member.stopped_metrics.get(result.metric) if is_stopped else result.value(member)
        if value is None or place is None:
            continue
        set_axes = [axis for axis in others if axis in member.set]
        label = ", ".join(f"{short[axis]} {value_text(own[axis])}" for axis in set_axes)
        points = found.setdefault((_beside(member.set, axes), label), ([], []))
        points[is_stopped].append((own[place], value))
    if others and len(found) > len(COLORS):
        merged: dict[tuple[str, str], _Points] = {}
        names = ", ".join(short[axis] for axis in others)
        for (beside, _), points in found.items():
            label = f"mean and standard deviation over {names}"
            completed, stopped = merged.setdefault((beside, label), ([], []))
            completed.extend(points[False])
            stopped.extend(points[True])
        found = merged
    return [_line(", ".join(filter(None, labels)), *points) for labels, points in found.items()]


def _drawn_values(result: SweepResult, key: str, lines: Sequence[Line]) -> list[Any]:
    """The values of the axis that ``lines`` have, in the order of the members."""
    drawn = {as_text(value) for line in lines for value in line.values}
    drawn |= {as_text(value) for line in lines for value, _ in line.stopped}
    found: dict[str, Any] = {}
    for member, own in zip(result.members, result.settings, strict=True):
        if (place := _place(member.set, key)) is not None:
            found.setdefault(as_text(own[place]), own[place])
    return [value for text, value in found.items() if text in drawn]


def axis_levels(result: SweepResult, key: str, axes: Sequence[str]) -> list[Line]:
    """What to compare an axis with: the members that do not set ``key``, such as full fine-tuning
    beside ranks. Of those that differ only in other ``axes``, the best."""
    found: dict[str, Line] = {}
    for group in result.groups:
        if group.mean is None or _place(group.set, key) is not None:
            continue
        label = _beside(group.set, axes) or group.members[0].name
        if label not in found or result.is_better(group.mean, found[label].means[0]):
            found[label] = Line(label, (), (group.mean,), (group.std or 0.0,))
    return list(found.values())


def _place(settings: Settings, key: str) -> str | None:
    """The setting that gives the group's position on the axis of ``key``; None if it has none."""
    return next((k for k in (key, _SAME_AXIS.get(key)) if k in settings), None)


def _beside(settings: Settings, axes: Sequence[str]) -> str:
    """A label for the settings outside ``axes``: the method alone, if it is one of them."""
    rest = {key: value for key, value in settings.items() if key not in (*axes, SEED)}
    if METHOD in rest:
        return value_text(rest[METHOD])
    return ", ".join(f"{short} {value_text(rest[key])}" for key, short in short_keys(rest).items())


def _line(label: str, points: Sequence[_Point], stopped: Sequence[_Point]) -> Line:
    at: dict[str, list[float]] = {}
    values = {as_text(value): value for value, _ in points}
    for value, measured in points:
        at.setdefault(as_text(value), []).append(measured)
    order = list(values)
    if all(map(_is_number, values.values())):
        order.sort(key=lambda text: float(values[text]))
    return Line(
        label,
        tuple(values[text] for text in order),
        tuple(fmean(at[text]) for text in order),
        tuple(stdev(at[text]) if len(at[text]) > 1 else 0.0 for text in order),
        tuple(stopped),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_logarithmic(key: str, values: Sequence[Any]) -> bool:
    """Whether the axis of ``key`` is logarithmic: that of a rank or a learning rate, and any other
    over a wide range, if its values are positive."""
    if not all(_is_number(value) and value > 0 for value in values):
        return False
    wide = max(values) >= _WIDE * min(values)
    return wide or key.rpartition(".")[2] in _LOGARITHMIC


def _figure(
    lines: Sequence[Line], levels: Sequence[Line], values: Sequence[Any], key: str, metric: str
) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axes = figure.subplots()
    if all(map(_is_number, values)):
        _draw_numbers(axes, lines, key, sorted(values))
    else:
        _draw_categories(axes, lines, values)
    if any(line.stopped for line in lines):
        _draw_stopped(axes, [], [], _look(0) | {"marker": "o", "color": "gray"}, _STOPPED)
    axes.set(xlabel=printable(key), ylabel=printable(metric))
    share = key == _DIMENSION and metric not in LOWER_IS_BETTER
    _draw_levels(axes, levels, len(lines), share)
    _, labels = axes.get_legend_handles_labels()
    if labels:
        columns = min(len(labels), max(1, _LEGEND // (max(map(len, labels)) + 8)))
        figure.legend(loc="outside lower center", ncols=columns)
    return figure


def _draw_numbers(axes: Axes, lines: Sequence[Line], key: str, values: Sequence[Any]) -> None:
    for at, line in enumerate(lines):
        _draw_line(axes, line, _look(at), float)
    if is_logarithmic(key, values):
        axes.set_xscale("log")
        axes.minorticks_off()
    step = -(-len(values) // _MOST_TICKS)
    axes.set_xticks(values[::step], [value_text(value) for value in values[::step]])


def _draw_categories(axes: Axes, lines: Sequence[Line], values: Sequence[Any]) -> None:
    """Points without lines between them; those of several lines stand side by side."""
    places = {as_text(value): at for at, value in enumerate(values)}
    for at, line in enumerate(lines):
        shift = (at - (len(lines) - 1) / 2) * 0.6 / max(len(lines), 4)
        look = _look(at) | {"linestyle": "none"}
        _draw_line(axes, line, look, partial(_shifted, places, shift))
    texts = [value_text(value) for value in values]
    short = [text if len(text) <= _TICK else f"{text[: _TICK - 3]}..." for text in texts]
    rotation = 0 if sum(map(len, short)) <= _LEGEND else 90
    axes.set_xticks(range(len(values)), short, rotation=rotation)
    axes.set_xlim(-0.5, len(values) - 0.5)


def _shifted(places: Mapping[str, int], shift: float, value: Any) -> float:
    return places[as_text(value)] + shift


def _draw_line(axes: Axes, line: Line, look: dict[str, Any], place: Callable[[Any], float]) -> None:
    """``place`` is where on the axis a value is."""
    label = line.label or None
    if line.values:
        x = [place(value) for value in line.values]
        spreads = line.spreads if any(line.spreads) else None
        axes.errorbar(x, line.means, spreads, **look, label=label)
    if line.stopped:
        x = [place(value) for value, _ in line.stopped]
        means = [metric for _, metric in line.stopped]
        _draw_stopped(axes, x, means, look, None if line.values else label)


def _draw_stopped(
    axes: Axes, x: Sequence[float], y: Sequence[float], look: dict[str, Any], label: str | None
) -> None:
    # Legends list what errorbar draws after what plot draws.
    style = {"color": look["color"], "marker": look["marker"], "markerfacecolor": "none"}
    axes.errorbar(x, y, linestyle="none", label=label, **style)


def _draw_levels(axes: Axes, levels: Sequence[Line], first: int, share: bool) -> None:
    """Dashed across the figure; with ``share``, what the intrinsic dimension requires is dotted."""
    for at, level in enumerate(levels, first):
        (color, _), height = color_and_marker(at), level.means[0]
        axes.axhline(height, color=color, linestyle="--", label=level.label)
        if share:
            label = f"{_SHARE:.0%} of {level.label}"
            axes.axhline(_SHARE * height, color=color, linestyle=":", label=label)


def _look(at: int) -> dict[str, Any]:
    color, marker = color_and_marker(at)
    return {"color": color, "marker": marker, "capsize": 2}
