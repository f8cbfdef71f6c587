"""The style of lorakit's figures: legible in print and to the color-blind. Needs matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.io.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "lines.linewidth": 1, "svg.hashsalt": "lorakit",
    "text.parse_math": False,  # a path or a name may contain a dollar sign
}  # fmt: skip
#: Okabe and Ito's palette, for as many lines as can be told apart.
COLORS = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000", "#8a8a8a",
)  # fmt: skip
_MARKERS = "os^Dv*PX"


@contextmanager
def figure_style(marker_size: float) -> Iterator[None]:
    """Draw in this style during the block, with markers of so many points."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE | {"lines.markersize": marker_size}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in letters that the font lacks
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # for a very long name
        yield


def color_and_marker(at: int) -> tuple[str, str]:
    """Those of the line with this number."""
    return COLORS[at % len(COLORS)], _MARKERS[at % len(_MARKERS)]


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``path`` with .png and .svg added to its name."""
    with atomic_file(path.with_name(f"{path.name}.png")) as file:
        figure.savefig(file, format="png", dpi=200)
    with atomic_file(path.with_name(f"{path.name}.svg")) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
