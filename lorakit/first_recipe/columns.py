"""What is in the columns of a split: chats, lists of words, texts, numbers, class names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.data.sources import Split
from lorakit.tasks.base import is_empty
from lorakit.tasks.labelling import as_float, as_integer, label_name, listed_values

#: ``chat``: lists of messages. ``words`` and ``ids``: lists of texts and of whole numbers.
#: ``flag``: 0 and 1 only. ``integer`` and ``number`` may be text, as in a csv file.
Kind = Literal["chat", "words", "ids", "text", "flag", "integer", "number", "empty", "other"]

#: At most this many rows are looked at, spread over the split.
SAMPLE_ROWS = 2000


@dataclass(frozen=True)
class Column:
    """A column of the sample. ``distinct`` counts different values that are not empty, ``filled``
    the values that are not, and ``mean_characters`` is the mean length of the texts among them."""

    name: str
    kind: Kind
    distinct: int
    filled: int
    mean_characters: float = 0.0

    @property
    def can_be_classes(self) -> bool:
        """Whether the values repeat as class names do: at most 100 different ones, short, each in
        two rows on average."""
        is_name = self.kind in ("flag", "integer") or (
            self.kind == "text" and self.mean_characters <= 40
        )
        return is_name and 2 <= self.distinct <= min(100, max(2, self.filled // 2))


def sampled(split: Split, count: int = SAMPLE_ROWS) -> list[int]:
    """The indices of ``count`` rows spread evenly over the split, or of all rows."""
    rows = len(split)
    return list(range(rows)) if rows <= count else [i * rows // count for i in range(count)]


def describe_columns(split: Split) -> dict[str, Column]:
    """Describe each column from a sample of the rows."""
    rows = [split.rows[index] for index in sampled(split)]
    return {name: _describe(name, [row.get(name) for row in rows]) for name in split.columns}


def _describe(name: str, values: Sequence[Any]) -> Column:
    filled = [value for value in values if not is_empty(value)]
    if not filled:
        return Column(name, "empty", 0, 0)
    texts = [value for value in filled if isinstance(value, str)]
    mean = sum(map(len, texts)) / len(texts) if texts else 0.0
    return Column(name, _kind(filled), len(set(map(str, filled))), len(filled), mean)


def _kind(values: Sequence[Any]) -> Kind:
    if (found := _list_kind(values)) is not None:
        return found
    if all(as_integer(value) is not None for value in values):
        return "flag" if {as_integer(value) for value in values} <= {0, 1} else "integer"
    if all(as_float(value) is not None for value in values):
        return "number"
    return "text" if all(isinstance(value, str) for value in values) else "other"


def _list_kind(values: Sequence[Any]) -> Kind | None:
    """The kind of a column of lists, which may be given as JSON; None if a value is no list."""
    lists = [listed_values(value) for value in values]
    elements = [element for found in lists for element in found or ()]
    if any(found is None for found in lists):
        return None
    checks: Mapping[Kind, Callable[[Any], bool]] = {
        "chat": _is_message,
        "words": lambda element: isinstance(element, str) and as_integer(element) is None,
        "ids": lambda element: as_integer(element) is not None,
    }
    return next((kind for kind, fits in checks.items() if all(map(fits, elements))), "other")


def _is_message(element: Any) -> bool:
    return isinstance(element, dict) and not {"role", "from"}.isdisjoint(element)


def class_names(split: Split, column: str) -> list[str]:
    """The class names in a column of names or of lists of names, in order of appearance."""
    found: dict[str, None] = {}
    for value in split.column(column):
        listed = listed_values(value)
        for each in [value] if listed is None else listed:
            if name := label_name(each):
                found[name] = None
    return list(found)
