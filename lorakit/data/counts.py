"""What is counted of the rows of a split while they are tokenised."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

#: So many bad rows are named, and all are counted.
NAMED_ROWS = 5


@dataclass
class Counts:
    """``rows`` are the source's, of which a chat may give several rows of tokens;
    ``truncated_rows`` and ``cut_completions`` are rows of tokens. ``skipped_rows`` of ``rows`` are
    left out as bad, the first of them in ``skipped`` by index and reason. ``notes`` are the counts
    of ``lorakit.data.chat.encode``, by name."""

    rows: int = 0
    truncated_rows: int = 0
    cut_completions: int = 0
    skipped_rows: int = 0
    skipped: list[tuple[int, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        self.rows += other.rows
        self.truncated_rows += other.truncated_rows
        self.cut_completions += other.cut_completions
        self.skipped_rows += other.skipped_rows
        self.skipped = (self.skipped + other.skipped)[:NAMED_ROWS]
        self.notes.update(other.notes)

    def skip(self, index: int, reason: str) -> None:
        """Count a bad row of the source."""
        self.skipped_rows += 1
        if len(self.skipped) < NAMED_ROWS:
            self.skipped.append((index, reason))
