"""Notes for the user: one line each, while something is computed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from lorakit.errors import printable

#: Receives one note at a time.
Say = Callable[[str], None]


def silent(_note: str) -> None:
    """Ignore a note."""


def to_stderr(note: str) -> None:
    """Print a note, without what would control a terminal; a closed pipe or a full disk ends
    nothing."""
    with contextlib.suppress(OSError):
        print(printable(note), file=sys.stderr, flush=True)
