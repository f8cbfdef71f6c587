"""Draws a report: the LoRA paper's figures 3 and 4, the ranks and the norms, as PNG and SVG.

Needs matplotlib, from the extra ``plots``. The colors are cividis and those of Okabe and Ito, which
remain distinct in gray and to the color-blind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit.errors import AdapterError, check_printable, printable
from lorakit.figures import color_and_marker, figure_style, save_figure
from lorakit.io.atomic import writing
from lorakit.module_names import ROLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lorakit.analysis.report import Grid, InspectReport, MatrixReport, Similarity

#: How many modules are drawn besides the mean over all, and the directions of the enlarged corner.
_MODULES, _CORNER = 4, 8
#: Up to this many columns, a cell of a heat map has room for its number.
_NUMBERED_COLUMNS = 20
_MOST_TICKS = 12
_FIGURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg")
_PATH = 60


def check_folder(folder: Path) -> None:
    """Raise AdapterError, before anything is computed, if nothing can be drawn into ``folder``."""
    if find_spec("matplotlib") is None:
        raise AdapterError("--plot needs matplotlib; hint: pip install 'lorakit[plots]'")
    check_printable(folder, "--plot")
    paths = (folder, *folder.absolute().parents)
    try:
        existing = next(path for path in paths if path.is_symlink() or path.exists())
    except OSError as error:  # too long
        raise AdapterError(f"--plot {folder}: cannot be created: {error.strerror}") from None
    if folder.suffix.lower() in _FIGURES and existing != folder:
        raise AdapterError(
            f"--plot {folder}: is the name of a file; allowed: a directory, for several figures"
        )
    if existing == folder and not existing.is_dir():
        raise AdapterError(f"--plot {folder}: exists and is not a directory")
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise AdapterError(f"--plot {folder}: {existing}: no write permission, or not a directory")


def draw(report: InspectReport, folder: Path) -> None:
    """Write ranks and norms and, of two adapters, similarity, each as .png and .svg, to ``folder``.
    Raises WriteFailed if the disk is full."""
    with figure_style(marker_size=3):
        figures = {"ranks": _ranks(report), "norms": _norms(report)}
        if report.similarity is not None:
            figures["similarity"] = _similarity(report.adapter, report.similarity, report.modules)
        with writing(f"--plot {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            for name, figure in figures.items():
                save_figure(figure, folder / name)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _by_layer(
    modules: Sequence[MatrixReport], value: Callable[[MatrixReport], float | None]
) -> tuple[list[str], list[str], Any]:
    """Roles, layers, and the mean value of each pair (roles, layers), NaN where there is none.
    Modules outside of layers have a last column."""
    roles = sorted({m.role for m in modules}, key=_role_order)
    names = [printable(role) for role in roles]  # SVG cannot contain control characters
    layers = sorted({m.layer for m in modules if m.layer is not None})
    columns = [str(layer) for layer in layers]
    if any(m.layer is None for m in modules):
        columns.append("none")
    cells: dict[tuple[int, int], list[float]] = {}
    for m in modules:
        column = columns.index("none" if m.layer is None else str(m.layer))
        if (found := value(m)) is not None:
            cells.setdefault((roles.index(m.role), column), []).append(found)
    table = np.full((len(roles), len(columns)), np.nan)
    for place, found_values in cells.items():
        table[place] = np.mean(found_values)
    return names, columns, table


def _role_order(role: str) -> tuple[int, str]:
    """q, k, v and o first."""
    known = list(ROLES)
    return (known.index(role) if role in known else len(known)), role


def _ranks(report: InspectReport) -> Figure:
    panels: tuple[tuple[str, str, Callable[[MatrixReport], float]], ...] = (
        ("rank r", "%.0f", lambda m: m.r),
        ("effective rank of ΔW", "%.1f", lambda m: m.effective_rank),
    )
    roles, columns, _ = _by_layer(report.modules, lambda m: m.r)
    width = min(7.0, 2.4 + 0.3 * len(columns))
    top = max(1.0, *(m.r for m in report.modules), *(m.effective_rank for m in report.modules))
    figure = _figure(width, 2 * (0.75 + 0.22 * len(roles)) + 0.2)
    figure.suptitle(_end(report.adapter), fontsize=8)
    for axes, (title, form, value) in zip(figure.subplots(2, 1), panels, strict=True):
        table = _by_layer(report.modules, value)[2]
        image = axes.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=top)
        axes.set(title=title, ylabel="role", yticks=range(len(roles)), yticklabels=roles)
        _label_layers(axes, columns)
        if len(columns) <= _NUMBERED_COLUMNS:
            _number_cells(axes, table, form, top)
        figure.colorbar(image, ax=axes, label="directions", pad=0.01)
    return figure


def _number_cells(axes: Any, table: Any, form: str, top: float) -> None:
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            color = "white" if value < top / 2 else "black"
            axes.text(column, row, form % value, ha="center", va="center", color=color, fontsize=6)


def _label_layers(axes: Any, columns: Sequence[str]) -> None:
    step = -(-len(columns) // _MOST_TICKS)
    places = range(0, len(columns), step)
    axes.set(xlabel="layer", xticks=places, xticklabels=[columns[at] for at in places])


def _norms(report: InspectReport) -> Figure:
    panels: list[tuple[str, str, Callable[[MatrixReport], float | None]]] = [
        ("‖A‖", "Frobenius norm of A", lambda m: m.norm_A),
        ("‖B‖", "Frobenius norm of B", lambda m: m.norm_B),
        ("‖ΔW‖", "Frobenius norm of ΔW", lambda m: m.norm_delta),
    ]
    if any(m.amplification is not None for m in report.modules):
        panels.append(("factor", "amplification ‖ΔW‖ / ‖UᵀWV‖", lambda m: m.amplification))
    figure = _figure(7, 2.2 * ((len(panels) + 1) // 2) + 0.7)
    figure.suptitle(_end(report.adapter), fontsize=8)
    grid = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).flatten()
    for axes, (label, title, value) in zip(grid, panels, strict=False):
        roles, columns, table = _by_layer(report.modules, value)
        for at, role in enumerate(roles):
            color, marker = color_and_marker(at)
            axes.plot(range(len(columns)), table[at], color=color, marker=marker, label=role)
        largest = np.nanmax(table, initial=0)
        axes.set(title=title, ylabel=label, ylim=(0, 1.08 * largest if largest else None))
        _label_layers(axes, columns)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(8, len(labels)), title="role"
    )
    return figure


def _similarity(adapter: str, found: Similarity, modules: Sequence[MatrixReport]) -> Figure:
    """Rows: modules of the middle layer, and the mean over all modules; columns: phi, its corner if
    it is much larger, and phi of random matrices."""
    rows = _chosen(found, modules)
    largest = max((max(len(phi), len(phi[0])) for _, phi, _ in rows), default=0)
    titles = ["trained", f"trained, i and j up to {_CORNER}", "random Gaussian"]
    has_corner = largest > 2 * _CORNER
    if not has_corner:
        del titles[1]
    figure = _figure(0.6 + 2.2 * len(titles), 0.7 + 1.9 * max(1, len(rows)))
    side = "right-singular vectors of A" if found.side == "right" else "left-singular vectors of B"
    figure.suptitle(
        f"subspace similarity of the {side}\ni: {_end(adapter)}\nj: {_end(found.other)}", fontsize=8
    )
    image = None
    panels = figure.subplots(max(1, len(rows)), len(titles), squeeze=False)
    for panel, (name, phi, control) in zip(panels, rows, strict=False):
        corner = [line[:_CORNER] for line in phi[:_CORNER]]
        shown = [phi, corner, control] if has_corner else [phi, control]
        for axes, values, title in zip(panel, shown, titles, strict=True):
            image = axes.imshow(
                values, origin="lower", cmap="cividis", vmin=0, vmax=1, aspect="auto",
                extent=(0.5, len(values[0]) + 0.5, 0.5, len(values) + 0.5),
            )  # fmt: skip
            axes.set(title=f"{name}\n{title}", xlabel="j", ylabel="i")
            axes.locator_params(integer=True, nbins=5)
    if image is not None:
        figure.colorbar(image, ax=panels, label="φ(i, j)", shrink=0.6)
    return figure


def _end(path: str) -> str:
    """As much of a path's end as the figure is wide."""
    path = printable(path)
    return path if len(path) <= _PATH else f"...{path[3 - _PATH :]}"


def _chosen(found: Similarity, modules: Sequence[MatrixReport]) -> list[tuple[str, Grid, Grid]]:
    """Name, phi and control of up to four modules, of the middle layer if there are layers, and of
    the mean over all."""
    about = {m.module: m for m in modules}
    drawn = [m for m in found.modules if m.phi and m.phi[0]]
    if not drawn:
        return []
    layers = sorted({layer for m in drawn if (layer := about[m.module].layer) is not None})
    middle = layers[len(layers) // 2] if layers else None
    own = [m for m in drawn if about[m.module].layer == middle]
    own = sorted(own, key=lambda m: _role_order(about[m.module].role))[:_MODULES]
    rows = [(_short(about[m.module]), m.phi, m.control_phi) for m in own]
    mean = (_mean([m.phi for m in drawn]), _mean([m.control_phi for m in drawn]))
    return [*rows, (f"mean of {len(drawn)}", *mean)]


def _short(matrix: MatrixReport) -> str:
    role = printable(matrix.role)
    return role if matrix.layer is None else f"{role}, layer {matrix.layer}"


def _mean(grids: Sequence[Grid]) -> Grid:
    """The mean of the part that all grids have."""
    rows, columns = min(map(len, grids)), min(len(grid[0]) for grid in grids)
    mean: Grid = np.mean([np.array(grid)[:rows, :columns] for grid in grids], axis=0).tolist()
    return mean
