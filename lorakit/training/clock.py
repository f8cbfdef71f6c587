"""The time that a run reports for its steps and evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


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


class StepWindow:
    """The tokens and the time of some steps, such as those of a log line.

    On a GPU the time is taken where the steps run: the host may be many steps ahead of it, and
    again be behind while it captures a pass. Times that ``clock`` leaves out are left out.
    """

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self._clock, self._device = clock, device
        self.restart()

    def restart(self) -> None:
        """Begin with the next step."""
        self.tokens, self._skipped = 0, 0.0
        self._host, self._wall = self._clock.now(), time.monotonic()
        self._event = self._mark()

    def skip(self, seconds: float) -> None:
        """Leave out a time at whose beginning and end the device had nothing to do."""
        self._skipped += seconds

    def host_seconds(self) -> float:
        return max(self._clock.now() - self._host - self._skipped, 1e-9)

    def end(self) -> Callable[[], float]:
        """Return a function for the tokens per second of the steps so far, to be called when the
        device has finished them, and restart."""
        tokens, seconds, event = self.tokens, self.host_seconds(), self._event
        idle = time.monotonic() - self._wall - seconds  # evaluations and pauses
        self.restart()
        end = self._event
        if event is None or end is None:
            return lambda: tokens / seconds
        return lambda: tokens / max(event.elapsed_time(end) / 1e3 - idle, 1e-9)

    def _mark(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
