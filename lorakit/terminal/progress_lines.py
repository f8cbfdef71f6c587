"""The progress of something as lines of a log, where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable


def progress_lines(
    say: Callable[[str], None], seconds: float = 10.0
) -> Callable[[str, int, int], None]:
    """Return a callback ``(what, done, total)`` that prints at most one line per ``seconds``, and
    if it has printed any of ``what``, another one at its end."""
    last, unfinished = time.monotonic(), ""
    newest = "", 0

    def report(what: str, done: int, total: int) -> None:
        nonlocal last, unfinished, newest
        if what != newest[0] or done < newest[1]:  # it starts now
            last = time.monotonic()
        newest = what, done
        if done >= total:
            is_due = what == unfinished
            unfinished = ""
        else:
            is_due = time.monotonic() - last >= seconds
            unfinished = what if is_due else unfinished
        if is_due:
            last = time.monotonic()
            say(f"{what} {done}/{total}")

    return report
