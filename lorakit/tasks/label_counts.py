"""How many rows of a split have each label, and which labels are probably one."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from lorakit.errors import shown

#: So many labels are listed one by one, and so many groups of labels that look alike.
_LISTED, _GROUPS = 12, 5


def label_counts(labels: Sequence[str], ids: Iterable[int | float]) -> dict[str, int]:
    """Label -> number of rows, in the order of ``labels``; ``ids`` are the rows' class indices."""
    found = Counter(map(int, ids))
    return {label: found[index] for index, label in enumerate(labels)}


def counts_line(counts: Mapping[str, int]) -> str:
    """The counts in one line; of many labels the most and the least frequent ones."""
    if len(counts) <= _LISTED:
        return _listed(counts.items())
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    there = [item for item in ordered if item[1]]
    text = f"{len(counts):,}, most often {_listed(there[:5])}; least often {_listed(there[-3:])}"
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


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{_quoted(label)} {count:,}" for label, count in counts)


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def _quoted(label: str) -> str:
    plain = label.isprintable() and label == label.strip() and len(label) <= 40
    return label if plain else shown(label, 40)
