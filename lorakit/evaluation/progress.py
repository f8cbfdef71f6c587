"""Report the progress of an evaluation, and stop it between batches."""

from __future__ import annotations

from collections.abc import Callable

#: Receives the rows done and the total.
OnProgress = Callable[[int, int], None]
#: Receives the phase ("loss", "generated" or "predicted"), the rows done and the total.
OnPhase = Callable[[str, int, int], None]
ShouldStop = Callable[[], bool]


class EvaluationStopped(Exception):
    """``should_stop`` returned true; there is no result."""


class ProgressMonitor:
    """Calls ``on_progress`` after each batch, and ``should_stop`` before the next."""

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
        """Report ``rows`` more rows as done."""
        self._done_rows += rows
        if self._on_progress is not None:
            self._on_progress(self._done_rows, self._total_rows)

    def check(self) -> None:
        """Raise EvaluationStopped if the evaluation is to stop here."""
        if self._should_stop is not None and self._should_stop():
            raise EvaluationStopped
