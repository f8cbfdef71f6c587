"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as lines with aligned columns: the first ``left`` to the left, the others to
    the right. A shorter row leaves the last columns empty. A wide letter, such as a Chinese one,
    counts as two."""
    columns = range(max(map(len, rows)))
    widths = [max(cell_len(row[at]) for row in rows if at < len(row)) for at in columns]

    def padded(cell: str, at: int) -> str:
        spaces = " " * (widths[at] - cell_len(cell))
        return cell + spaces if at < left else spaces + cell

    return "\n".join(
        "  ".join(padded(cell, at) for at, cell in enumerate(row)).rstrip() for row in rows
    )
