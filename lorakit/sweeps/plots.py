"""Draws a sweep: its metric against each axis of the grid, as PNG and SVG.

Needs matplotlib, from the extra ``plots``. The colors are those of Okabe and Ito, which remain
distinct in gray and to the color-blind.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from lorakit.errors import printable
from lorakit.io.atomic import atomic_file, writing
from lorakit.pipeline.task_data import Say
from lorakit.sweeps.members import SEED, as_text
from lorakit.sweeps.names import safe_name, short_keys, value_text
from lorakit.sweeps.results import SweepResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Keys whose values are compared by their ratios.
_LOGARITHMIC = ("learning_rate", "r", "target_r", "init_r", "lora_alpha")
#: The ratio of the largest to the smallest value above which any axis is logarithmic.
_WIDE = 20
#: How many characters a row of the legend has room for.
_LEGEND = 70
_STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "lines.markersize": 4, "lines.linewidth": 1, "svg.hashsalt": "lorakit",
    "text.parse_math": False,  # a name may contain a dollar sign
}  # fmt: skip
_COLORS = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000", "#8a8a8a",
)  # fmt: skip
_MARKERS = "os^Dv*PX"


@dataclass(frozen=True)
class Line:
    """The metric at some values of an axis: the mean, and the standard deviation over members with
    the same settings but for the seed, or over all that have the value."""

    label: str
    values: tuple[Any, ...]
    means: tuple[float, ...]
    spreads: tuple[float, ...]


def draw(result: SweepResult, axes: Sequence[str], say: Say) -> None:
    """Draw the metric against each of ``axes``, the keys of the grid, into ``plots/``; against the
    seed only if there is no other. Members that are not completed are left out."""
    drawn = [key for key in axes if key != SEED] or list(axes)
    lines = {key: axis_lines(result, key, drawn) for key in drawn}
    if not any(lines.values()):
        return
    if find_spec("matplotlib") is None:
        say("plots need matplotlib; hint: pip install 'lorakit[plots]', then --resume")
        return
    import matplotlib as mpl

    folder = result.output_dir / "plots"
    with mpl.rc_context(_STYLE), warnings.catch_warnings(), writing(folder):
        warnings.filterwarnings("ignore", "Glyph")  # of a name in letters that the font lacks
        folder.mkdir(exist_ok=True)
        for key, name in short_keys(drawn).items():
            if lines[key]:
                _save(_figure(lines[key], key, result.metric), folder / safe_name(name))


def axis_lines(result: SweepResult, key: str, axes: Sequence[str]) -> list[Line]:
    """A line for each combination of the values of the other ``axes``; if these are more than there
    are colors, one over all of them."""
    others = [axis for axis in axes if axis not in (key, SEED)]
    short = short_keys(axes)
    found: dict[str, dict[str, list[tuple[Any, float]]]] = {}
    for member, own in zip(result.members, result.settings, strict=True):
        value = result.value(member)
        if value is None or not {key, *others} <= member.set.keys():
            continue
        label = ", ".join(f"{short[axis]} {value_text(own[axis])}" for axis in others)
        at = found.setdefault(label, {}).setdefault(as_text(own[key]), [])
        at.append((own[key], value))
    if len(found) > len(_COLORS):
        merged: dict[str, list[tuple[Any, float]]] = {}
        for line in found.values():
            for text, points in line.items():
                merged.setdefault(text, []).extend(points)
        names = ", ".join(short[axis] for axis in others)
        found = {f"mean and standard deviation over {names}": merged}
    return [_line(label, list(points.values())) for label, points in found.items()]


def _line(label: str, points: Sequence[Sequence[tuple[Any, float]]]) -> Line:
    if all(_is_number(at[0][0]) for at in points):
        points = sorted(points, key=lambda at: float(at[0][0]))
    measured = [[value for _, value in at] for at in points]
    return Line(
        label,
        tuple(at[0][0] for at in points),
        tuple(map(fmean, measured)),
        tuple(stdev(values) if len(values) > 1 else 0.0 for values in measured),
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


def _figure(lines: Sequence[Line], key: str, metric: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axes = figure.subplots()
    values = list({as_text(value): value for line in lines for value in line.values}.values())
    if all(map(_is_number, values)):
        _draw_numbers(axes, lines, key, sorted(values))
    else:
        _draw_categories(axes, lines, values)
    axes.set(xlabel=printable(key), ylabel=printable(metric))
    if any(line.label for line in lines):
        longest = max(len(line.label) for line in lines)
        columns = min(len(lines), max(1, _LEGEND // (longest + 8)))
        figure.legend(loc="outside lower center", ncols=columns)
    return figure


def _draw_numbers(axes: Axes, lines: Sequence[Line], key: str, values: Sequence[Any]) -> None:
    for at, line in enumerate(lines):
        axes.errorbar(line.values, line.means, line.spreads, **_look(at), label=line.label or None)
    if is_logarithmic(key, values):
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(values, [value_text(value) for value in values])


def _draw_categories(axes: Axes, lines: Sequence[Line], values: Sequence[Any]) -> None:
    """Points without lines between them; those of several lines stand side by side."""
    places = {as_text(value): at for at, value in enumerate(values)}
    for at, line in enumerate(lines):
        shift = (at - (len(lines) - 1) / 2) * 0.6 / max(len(lines), 4)
        x = [places[as_text(value)] + shift for value in line.values]
        look = _look(at) | {"linestyle": "none"}
        axes.errorbar(x, line.means, line.spreads, **look, label=line.label or None)
    axes.set_xticks(range(len(values)), [printable(value_text(value)) for value in values])
    axes.set_xlim(-0.5, len(values) - 0.5)


def _look(at: int) -> dict[str, Any]:
    return {
        "color": _COLORS[at % len(_COLORS)],
        "marker": _MARKERS[at % len(_MARKERS)],
        "capsize": 2,
    }


def _save(figure: Figure, path: Any) -> None:
    with atomic_file(path.with_name(f"{path.name}.png")) as file:
        figure.savefig(file, format="png", dpi=200)
    with atomic_file(path.with_name(f"{path.name}.svg")) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
