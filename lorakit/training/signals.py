"""SIGINT, SIGTERM and SIGHUP ask the loop to stop at the next step; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lorakit.errors import Interrupted


class StopRequest:
    """``signal_number`` is 0 until a signal arrives."""

    def __init__(self) -> None:
        self.signal_number = 0

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number:
            raise Interrupted("stopped at once by a second signal", number)
        self.signal_number = number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch them while the block runs (in the main thread; elsewhere nothing is caught).

    A signal that is ignored, as SIGHUP under nohup, stays so.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    every = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    numbers = [number for number in every if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, request._on_signal) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
