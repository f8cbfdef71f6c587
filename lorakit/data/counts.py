"""What is counted of the rows of a split while they are tokenised."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """``rows`` are the source's, of which a chat may give several rows of tokens;
    ``truncated_rows`` and ``cut_completions`` are rows of tokens. ``notes`` are the counts of
    ``lorakit.data.chat.encode``, by name."""

    rows: int = 0
    truncated_rows: int = 0
    cut_completions: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        self.rows += other.rows
        self.truncated_rows += other.truncated_rows
        self.cut_completions += other.cut_completions
        self.notes.update(other.notes)
