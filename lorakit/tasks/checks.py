"""How many rows of a split have each label, and which labels are probably one.

Columns and keys of the data that a task does not read, named with the rows that have them.

Columns of a template that some rows lack: empty in the text, and said.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.data.rows import UnreadRow, row_range
from lorakit.data.sources import Split
from lorakit.errors import shown
from lorakit.tasks.base import Row, Task
from lorakit.tasks.messages import holds_something

#: So many labels are listed one by one, and so many groups of labels that look alike.
_LISTED, _GROUPS = 12, 5


def label_counts(labels: Sequence[str], ids: Iterable[int | float]) -> dict[str, int]:
    """Label -> number of rows, in the order of ``labels``; ``ids`` are the rows' class indices."""
    found = Counter(map(int, ids))
    return {label: found[index] for index, label in enumerate(labels)}


def counts_line(counts: Mapping[str, int]) -> str:
    """The counts in one line; of many labels the most and the least frequent ones."""
    if len(counts) <= _LISTED:
        return _listed_counts(counts.items())
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    there = [item for item in ordered if item[1]]
    most, least = _listed_counts(there[:5]), _listed_counts(there[-3:])
    text = f"{len(counts):,}, most often {most}; least often {least}"
    return text + (
        f"; {len(ordered) - len(there):,} in no row" if len(there) < len(ordered) else ""
    )


def look_alikes(counts: Mapping[str, int]) -> list[str]:
    """A line for each group of labels that differ only by case, white space or the Unicode form of
    their characters."""
    groups: dict[str, list[str]] = defaultdict(list)
    for label in counts:
        groups[folded_label(label)].append(label)
    alike = [group for group in groups.values() if len(group) > 1]
    lines = [
        "warning: labels that differ only by case or white space are separate classes: "
        + ", ".join(f"{shown(label)} ({_rows(counts[label])})" for label in group[:6])
        for group in alike[:_GROUPS]
    ]
    more = len(alike) - _GROUPS
    return [*lines, f"warning: so do {more:,} more groups of labels"] if more > 0 else lines


def folded_label(label: str) -> str:
    """What labels that look alike have in common."""
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())


def _listed_counts(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{_quoted(label)} {count:,}" for label, count in counts)


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def _quoted(label: str) -> str:
    plain = label.isprintable() and label == label.strip() and len(label) <= 40
    return label if plain else shown(label, 40)


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
    whole = rows == len(split) and not split.is_head
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


_ABSENT_BATCH_ROWS = 1000


def absent_notes(task: Task, config: object, split: Split) -> list[str]:
    """A line for each column of a template that rows of ``split`` lack, with their number."""
    columns = task.template_columns(config)
    if not columns:
        return []
    rows = min(len(split), COUNTED_ROWS)
    found: Counter[str] = Counter()
    for start in range(0, rows, _ABSENT_BATCH_ROWS):
        for row in row_range(split.rows, start, min(start + _ABSENT_BATCH_ROWS, rows)):
            found.update(_absent(row, columns))
    whole = rows == len(split) and not split.is_head
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
