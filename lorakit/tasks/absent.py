"""Columns of a template that some rows lack: empty in the text, and said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from lorakit.data.rows import UnreadRow, row_range
from lorakit.data.sources import Split
from lorakit.tasks.base import Row, Task
from lorakit.tasks.unused import COUNTED_ROWS

_BATCH_ROWS = 1000


def absent_notes(task: Task, config: object, split: Split) -> list[str]:
    """A line for each column of a template that rows of ``split`` lack, with their number."""
    columns = task.template_columns(config)
    if not columns:
        return []
    rows = min(len(split), COUNTED_ROWS)
    found: Counter[str] = Counter()
    for start in range(0, rows, _BATCH_ROWS):
        for row in row_range(split.rows, start, min(start + _BATCH_ROWS, rows)):
            found.update(_absent(row, columns))
    whole = rows == len(split) and not split.begun
    of = f"of {rows:,} rows" if whole else f"of the first {rows:,} rows"
    return [
        f"{split.name}: {found[column]:,} {of} have no {column!r}: empty in the template"
        for column in columns
        if found[column]
    ]


class AbsentWatch:
    """Says once of each column that rows behind the first ones of a stream, ``head``, lack it,
    unless some of these do."""

    def __init__(self, task: Task, config: object, head: Split, say: Callable[[str], None]) -> None:
        self._columns = task.template_columns(config)
        self._say, self._name = say, head.name
        self._known = {name for row in head.rows for name in _absent(row, self._columns)}

    def see(self, row: Row) -> None:
        for column in _absent(row, self._columns):
            if column not in self._known:
                self._known.add(column)
                self._say(f"{self._name}: further rows have no {column!r}: empty in the template")


def _absent(row: Row, columns: tuple[str, ...]) -> list[str]:
    if isinstance(row, UnreadRow):
        return []
    return [column for column in columns if row.get(column) is None]
