"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as lines with aligned columns: the first ``left`` to the left, the others to
    the right. A shorter row leaves the last columns empty."""
    columns = range(max(map(len, rows)))
    widths = [max(len(row[at]) for row in rows if at < len(row)) for at in columns]
    return "\n".join(
        "  ".join(
            cell.ljust(widths[at]) if at < left else cell.rjust(widths[at])
            for at, cell in enumerate(row)
        ).rstrip()
        for row in rows
    )
