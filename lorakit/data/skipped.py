"""The bad rows of a stream, which are left out while it is read."""

from __future__ import annotations

from collections.abc import Callable

from lorakit.data.counts import NAMED_ROWS
from lorakit.data.stream import Located


class SkippedRows:
    """Counts each row once, however often the stream begins anew; ``say`` gets the first ones."""

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name = name
        self._say = say
        self._seen: set[tuple[str, int]] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, row: Located, reason: str) -> None:
        place = (row.source, row.number)
        if place in self._seen:
            return
        self._seen.add(place)
        if len(self) <= NAMED_ROWS:
            self._say(f"{self._name}: row skipped (task.on_bad_row: skip): {row}: {reason}")

    def note(self) -> str | None:
        """How many there were; None for none."""
        if not self._seen:
            return None
        rows = f"{len(self):,} row{'s' * (len(self) > 1)}"
        return f"{self._name}: {rows} skipped in all (task.on_bad_row: skip)"
