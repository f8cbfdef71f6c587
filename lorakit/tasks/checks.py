"""Notes on a split's rows: labels and their counts, missing and unused columns, unused keys."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.data.rows import UnreadRow, row_range
from lorakit.data.sources import Split
from lorakit.errors import counted, shown
from lorakit.tasks.base import Row, Task, is_empty

#: At most this many rows are counted; for a larger split the note says so.
COUNTED_ROWS = 100_000
_BATCH_ROWS = 1000
#: At most this many columns and keys, labels, and groups of similar labels are listed.
_MAX_KEYS, _MAX_LABELS, _MAX_GROUPS = 20, 12, 5
_MAX_NAME = 60
_DROPPED = "have messages after the last trained one; these are dropped"


def column_notes(task: Task, config: Any, split: Split) -> list[str]:
    """Return one note per template column that rows lack, one on unused columns and keys, and one
    on chats whose last messages are dropped, each with its number of rows."""
    inspector = _Inspector(task, config, split.columns)
    if not inspector.finds_anything:
        return []
    counts = _count(inspector, split)
    complete = counts.rows == len(split) and not split.is_head
    of = f"of {counts.rows:,}" if complete else f"of the first {counts.rows:,}"
    notes = [
        f"{counts.missing[column]:,} {of} rows have no {column!r}, which is empty in the template"
        for column in inspector.template_columns
        if counts.missing[column]
    ]
    if counts.unused:
        keys = _listed_keys(counts.unused)
        notes.append(
            f"{counts.with_unused:,} {of} rows have values that the task does not use: {keys}"
        )
    if counts.dropping:
        notes.append(f"{counts.dropping:,} {of} chats {_DROPPED}")
    return [f"{split.name}: {note}" for note in notes]


class ColumnWatch:
    """Reports the problems of ``column_notes`` in the rows of a stream after ``head``, once per
    column or key, unless ``head`` has the same problem."""

    def __init__(self, task: Task, config: Any, head: Split, say: Callable[[str], None]) -> None:
        self._inspector = _Inspector(task, config, head.columns)
        self._say, self._name = say, head.name
        self._known: set[str] = set()
        for row in head.rows:
            self._new(row)

    def see(self, row: Row) -> None:
        """Inspect a row that is about to be trained on, unless it could not be read."""
        if isinstance(row, UnreadRow):
            return
        for note in self._new(row):
            self._say(f"{self._name}: further {note}")

    def _new(self, row: Row) -> list[str]:
        """Return notes on problems that no earlier row had."""
        unused = self._inspector.unused(row)
        new = sorted(unused - self._known)
        notes = [f"rows have values that the task does not use: {', '.join(new)}"] if new else []
        missing = self._inspector.missing(row)
        found = [f"chats {_DROPPED}"] if self._inspector.drops_messages(row) else []
        found += [f"rows have no {column!r}, which is empty in the template" for column in missing]
        notes += [note for note in found if note not in self._known]
        self._known |= {*unused, *found}
        return notes


class _Inspector:
    """Finds the parts of a row that a task does not use, and columns that its template lacks."""

    def __init__(self, task: Task, config: Any, columns: Sequence[str]) -> None:
        self._task, self._config = task, config
        self.template_columns = task.template_columns(config)
        read = task.read_columns(config, columns)
        self._reports_unused = read is not None
        self._read = columns if read is None else read
        self.unused_columns = [column for column in columns if column not in self._read]

    @property
    def finds_anything(self) -> bool:
        nested = self._reports_unused and type(self._task).unused_keys is not Task.unused_keys
        return bool(self.template_columns or self.unused_columns or nested)

    def missing(self, row: Row) -> list[str]:
        if isinstance(row, UnreadRow):
            return []
        return [column for column in self.template_columns if row.get(column) is None]

    def unused(self, row: Row) -> set[str]:
        if not self._reports_unused:
            return set()
        keys = set(map(_name, self._task.unused_keys(row, self._config)))
        columns = (key for key in row if key not in self._read and not is_empty(row[key]))
        return keys.union(map(_column, columns))

    def drops_messages(self, row: Row) -> bool:
        return self._reports_unused and self._task.drops_messages(row, self._config)


@dataclass
class _Counts:
    """Numbers of rows: by missing column, by unused key, with any unused key, and with dropped
    messages."""

    rows: int
    missing: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    with_unused: int = 0
    dropping: int = 0


def _count(inspector: _Inspector, split: Split) -> _Counts:
    counts = _Counts(min(len(split), COUNTED_ROWS))
    for row in _first_rows(split, counts.rows):
        counts.missing.update(inspector.missing(row))
        unused = inspector.unused(row)
        counts.unused.update(unused)
        counts.with_unused += bool(unused)
        counts.dropping += inspector.drops_messages(row)
    if counts.rows < len(split):  # a column that is empty so far may be filled later
        counts.unused.update(dict.fromkeys(map(_column, inspector.unused_columns), 0))
    return counts


def _first_rows(split: Split, count: int) -> Iterator[Row]:
    for start in range(0, count, _BATCH_ROWS):
        yield from row_range(split.rows, start, min(start + _BATCH_ROWS, count))


def _column(name: str) -> str:
    return f"column {_name(name)}"


def _name(key: str) -> str:
    """The key, quoted and shortened if it would not read as a name."""
    plain = key.isprintable() and " " not in key and "," not in key and len(key) <= _MAX_NAME
    return key if plain else shown(key)


def _listed_keys(found: Counter[str]) -> str:
    """The most frequent keys first, equally frequent ones by name."""
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{key} ({count:,})" for key, count in ordered[:_MAX_KEYS]]
    more = len(found) - len(named)
    return ", ".join(named) + (f" and {more:,} more" if more else "")


def label_counts(labels: Sequence[str], ids: Iterable[int | float]) -> dict[str, int]:
    """The number of rows by label, in the order of ``labels``; ``ids`` are the class indices of
    all rows."""
    found = Counter(map(int, ids))
    return {label: found[index] for index, label in enumerate(labels)}


def counts_line(counts: Mapping[str, int]) -> str:
    """Format the counts in one line; if there are many labels, only the most and least frequent."""
    if len(counts) <= _MAX_LABELS:
        return _listed_labels(counts.items())
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    found = [item for item in ordered if item[1]]
    most, least = _listed_labels(found[:5]), _listed_labels(found[-3:])
    text = f"{len(counts):,}, most frequent {most}; least frequent {least}"
    unused = len(ordered) - len(found)
    return text + (f"; {unused:,} unused" if unused else "")


def similar_labels(counts: Mapping[str, int]) -> list[str]:
    """A warning for each group of labels that differ only by case, whitespace or Unicode form."""
    groups: dict[str, list[str]] = defaultdict(list)
    for label in counts:
        groups[folded_label(label)].append(label)
    similar = [group for group in groups.values() if len(group) > 1]
    lines = [
        "warning: labels that differ only in case or whitespace are separate classes: "
        + ", ".join(f"{shown(label)} ({counted(counts[label], 'row')})" for label in group[:6])
        for group in similar[:_MAX_GROUPS]
    ]
    more = len(similar) - _MAX_GROUPS
    return [*lines, f"warning: {more:,} more such groups of labels"] if more > 0 else lines


def folded_label(label: str) -> str:
    """Normalize a label, so that similar labels become equal."""
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())


def _listed_labels(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{_label(label)} {count:,}" for label, count in counts)


def _label(label: str) -> str:
    plain = label.isprintable() and label == label.strip() and len(label) <= 40
    return label if plain else shown(label, 40)
