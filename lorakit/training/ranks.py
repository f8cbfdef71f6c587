"""The ranks that a run chose, for ``run.json`` and for the eye."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def rank_list(ranks: Mapping[str, int]) -> list[dict[str, Any]]:
    """For each matrix its ``module``, ``layer`` (null outside of the layers) and ``rank``."""
    return [{"module": name, "layer": _layer(name), "rank": rank} for name, rank in ranks.items()]


def rank_table(ranks: Mapping[str, int]) -> str:
    """A row a layer, a column a matrix of it, ``.`` where there is none; totals below."""
    rows = sorted({_layer(name) for name in ranks}, key=lambda layer: (layer is None, layer or 0))
    columns = list(dict.fromkeys(map(_matrix, ranks)))
    cells = {(_layer(name), _matrix(name)): rank for name, rank in ranks.items()}
    total = {column: sum(r for (_, c), r in cells.items() if c == column) for column in columns}
    lines = [["layer", *columns, "total"]]
    for row in rows:
        values = [cells.get((row, column)) for column in columns]
        shown = ["." if value is None else str(value) for value in values]
        label = "-" if row is None else str(row)
        lines.append([label, *shown, str(sum(value or 0 for value in values))])
    lines.append(["total", *(str(total[c]) for c in columns), str(sum(ranks.values()))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _layer(name: str) -> int | None:
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(number.group(1)) if number else None


def _matrix(name: str) -> str:
    """The name behind the layer's number, its last two parts at most."""
    inside = re.split(r"(?:^|\.)\d+\.", name, maxsplit=1)[-1]
    return ".".join(inside.split(".")[-2:])
