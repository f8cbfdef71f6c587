"""The time that a run reports for its steps and evaluations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Stands still while a run is prepared or writes files. Runs that take their steps together
    share one, so that none of them counts what the others prepare or write."""

    def __init__(self) -> None:
        self._pauses, self._paused_at, self._paused_seconds = 0, 0.0, 0.0

    def now(self) -> float:
        """Seconds since some moment, without pauses."""
        now = self._paused_at if self._pauses else time.monotonic()
        return now - self._paused_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock during the block; blocks may be nested."""
        if not self._pauses:
            self._paused_at = time.monotonic()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._paused_seconds += time.monotonic() - self._paused_at
