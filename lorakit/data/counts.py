"""What tokenization counts: rows, truncated and skipped ones, and what became of chats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from lorakit.data.rows import NAMED_ROWS

#: Names in ``Counts.notes``: documents that were split, and the rows of tokens that they became.
SPLIT_DOCUMENTS, DOCUMENT_PARTS = "split_documents", "document_parts"


@dataclass
class Counts:
    """Counts of a split's rows.

    ``rows`` counts rows of the source, each of which may become several rows of tokens if it is a
    chat or a long document; ``truncated_rows`` and ``cut_completions`` count rows of tokens.
    ``tokens`` are those of all rows, without the ``lost_tokens`` of truncated ones.
    ``skipped_rows`` were skipped as bad; ``skipped`` has the index and reason of the first ones.
    ``notes`` are ``SPLIT_DOCUMENTS``, ``DOCUMENT_PARTS`` and the counts of
    ``lorakit.data.chat.encode``, by name.
    """

    rows: int = 0
    tokens: int = 0
    truncated_rows: int = 0
    lost_tokens: int = 0
    cut_completions: int = 0
    skipped_rows: int = 0
    skipped: list[tuple[int, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        self.rows += other.rows
        self.tokens += other.tokens
        self.truncated_rows += other.truncated_rows
        self.lost_tokens += other.lost_tokens
        self.cut_completions += other.cut_completions
        self.skipped_rows += other.skipped_rows
        self.skipped = (self.skipped + other.skipped)[:NAMED_ROWS]
        self.notes.update(other.notes)

    def skip(self, index: int, reason: str) -> None:
        """Count a bad row of the source."""
        self.skipped_rows += 1
        if len(self.skipped) < NAMED_ROWS:
            self.skipped.append((index, reason))


#: Called with the index of a skipped row and the reason.
OnBadRow = Callable[[int, str], None]
