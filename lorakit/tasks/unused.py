"""Columns and keys of the data that a task does not read, named with the rows that have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from lorakit.data.rows import row_range
from lorakit.data.sources import Split
from lorakit.errors import shown
from lorakit.tasks.base import Row, Task
from lorakit.tasks.message import holds_something

#: At most so many rows are read for the count; of larger splits the line says so.
COUNTED_ROWS = 100_000
_BATCH_ROWS = 1000
_NAMED = 20
_LONGEST_NAME = 60
_LEFT = "have turns after the last trained one; these are left out"


@dataclass
class _Counted:
    """``keys`` and the rows that hold each; the rows that have any, and those with turns left
    out."""

    keys: Counter[str] = field(default_factory=Counter)
    having_keys: int = 0
    left: int = 0


def unused_notes(task: Task, config: Any, split: Split) -> list[str]:
    """What of ``split`` the task does not use: a line that names the columns and keys, each with
    the number of rows in which it holds something, and one that counts the chats of which the last
    turns are left out."""
    read = task.read_columns(config, split.columns)
    if read is None:
        return []
    others = [column for column in split.columns if column not in read]
    nested = type(task).unread_keys is not Task.unread_keys
    if not others and not nested:
        return []
    rows = min(len(split), COUNTED_ROWS)
    counted = _count(task, config, split, rows, others)
    if rows < len(split):  # these may begin to hold something further on
        counted.keys.update({_column(column): 0 for column in others})
    whole = rows == len(split) and not split.begun
    of = f"of {rows:,}" if whole else f"of the first {rows:,}"
    notes = []
    if counted.keys:
        named = _listed(counted.keys)
        notes.append(f"{counted.having_keys:,} {of} rows have keys that are not used: {named}")
    if counted.left:
        notes.append(f"{counted.left:,} {of} chats {_LEFT}")
    return [f"{split.name}: {note}" for note in notes]


class UnusedWatch:
    """Names the keys of a stream that appear first behind its first rows, ``head``, each once, and
    says once that turns are left out."""

    def __init__(self, task: Task, config: Any, head: Split, say: Callable[[str], None]) -> None:
        self._task, self._config, self._say, self._name = task, config, say, head.name
        self._read = task.read_columns(config, head.columns)
        self._known: set[str] = set()
        self._said_left = False
        for row in head.rows:
            self._known.update(self._keys(row))
            self._said_left = self._said_left or self._has_left(row)

    def see(self, row: Row) -> None:
        """Look at a row that is about to be trained on."""
        new = self._keys(row) - self._known
        if new:
            self._known |= new
            named = ", ".join(sorted(new))
            self._say(f"{self._name}: further rows have keys that are not used: {named}")
        if not self._said_left and self._has_left(row):
            self._said_left = True
            self._say(f"{self._name}: further chats {_LEFT}")

    def _has_left(self, row: Row) -> bool:
        return self._read is not None and self._task.has_left_turns(row, self._config)

    def _keys(self, row: Row) -> set[str]:
        if self._read is None:
            return set()
        return _unused(self._task, self._config, row, self._read)


def _count(task: Task, config: Any, split: Split, rows: int, others: list[str]) -> _Counted:
    """In the first ``rows`` rows."""
    counted = _Counted()
    read = set(split.columns) - set(others)
    for start in range(0, rows, _BATCH_ROWS):
        for row in row_range(split.rows, start, min(start + _BATCH_ROWS, rows)):
            keys = _unused(task, config, row, read)
            counted.keys.update(keys)
            counted.having_keys += bool(keys)
            counted.left += task.has_left_turns(row, config)
    return counted


def _unused(task: Task, config: Any, row: Row, read: Collection[str]) -> set[str]:
    keys = set(map(_name, task.unread_keys(row, config)))
    keys.update(_column(key) for key in row if key not in read and holds_something(row[key]))
    return keys


def _column(name: str) -> str:
    return f"column {_name(name)}"


def _name(key: str) -> str:
    """As it stands, or quoted (and cut) where it would not read as a name."""
    reads = key.isprintable() and " " not in key and "," not in key and len(key) <= _LONGEST_NAME
    return key if reads else shown(key)


def _listed(found: Counter[str]) -> str:
    """The most frequent first, those of one count by name."""
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{key} ({count:,})" for key, count in ordered[:_NAMED]]
    left = len(found) - len(named)
    return ", ".join(named) + (f" and {left:,} more" if left else "")
