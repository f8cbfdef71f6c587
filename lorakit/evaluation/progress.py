"""How far an evaluation is, and whether it shall go on."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int], None]
#: What is being done ("loss", "generated"), rows done, rows in all. Each row passes every phase.
OnPhase = Callable[[str, int, int], None]
ShouldStop = Callable[[], bool]


class EvaluationStopped(Exception):
    """``should_stop`` said so; nothing was measured."""


class Watch:
    """Tells ``on_progress`` (rows done, rows in all) and asks ``should_stop`` between batches."""

    def __init__(
        self,
        total_rows: int,
        on_progress: OnProgress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> None:
        self._total_rows = total_rows
        self._done_rows = 0
        self._on_progress = on_progress
        self._should_stop = should_stop

    def advance(self, rows: int) -> None:
        self._done_rows += rows
        if self._on_progress is not None:
            self._on_progress(self._done_rows, self._total_rows)

    def check(self) -> None:
        """Raise EvaluationStopped if the evaluation is to end here."""
        if self._should_stop is not None and self._should_stop():
            raise EvaluationStopped
