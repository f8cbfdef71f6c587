"""Ranks of adapted matrices, as a list and as a table of layers and matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lorakit.module_names import layer_of
from lorakit.terminal.columns import aligned


def rank_list(ranks: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each matrix's ``module``, ``layer`` (null outside the numbered layers) and ``rank``."""
    return [{"module": name, "layer": layer_of(name), "rank": rank} for name, rank in ranks.items()]


def rank_table(ranks: Mapping[str, int]) -> str:
    """Format a table with a row per layer and a column per matrix, ``.`` for none, and totals.
    Stacked matrices (``NAME[0]``, ``NAME[1]``) are added up."""
    rows = sorted({layer_of(name) for name in ranks}, key=lambda layer: (layer is None, layer or 0))
    matrices = matrix_names(ranks)
    columns = list(dict.fromkeys(matrices.values()))
    cells: dict[tuple[int | None, str], int] = {}
    for name, rank in ranks.items():
        place = layer_of(name), matrices[name]
        cells[place] = cells.get(place, 0) + rank
    total = {column: sum(r for (_, c), r in cells.items() if c == column) for column in columns}
    lines = [["layer", *columns, "total"]]
    for row in rows:
        values = [cells.get((row, column)) for column in columns]
        shown = ["." if value is None else str(value) for value in values]
        label = "-" if row is None else str(row)
        lines.append([label, *shown, str(sum(value or 0 for value in values))])
    lines.append(["total", *(str(total[c]) for c in columns), str(sum(ranks.values()))])
    return aligned(lines, left=0)


def matrix_names(names: Iterable[str]) -> dict[str, str]:
    """A short name of each matrix: the last two parts of its name after the layer's number, or as
    many as tell the matrices of every layer apart. Those of a stack have the same."""
    places = {name: (layer_of(name), _inside(name)) for name in names}
    most = max((len(inside.split(".")) for _, inside in places.values()), default=2)
    for count in range(2, most + 1):
        short = {name: ".".join(place[1].split(".")[-count:]) for name, place in places.items()}
        if len({(places[name][0], short[name]) for name in places}) == len({*places.values()}):
            return short
    return {name: inside for name, (_, inside) in places.items()}


def _inside(name: str) -> str:
    return re.split(r"(?:^|\.)\d+\.", of_stack(name), maxsplit=1)[-1]


def of_stack(name: str) -> str:
    """The name of the stack that the matrix ``NAME[3]`` is in; any other name itself."""
    return re.sub(r"\[\d+\]$", "", name)
