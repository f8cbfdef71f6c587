"""The console of tables and bars on stderr."""

from __future__ import annotations

import contextlib
import sys
from typing import IO, Any, cast

from rich.console import Console


def stderr_console() -> Console:
    """A console on stderr as it is now. A terminal that was closed, a pipe without a reader or a
    full disk does not end what is shown."""
    return (
        Console(stderr=True)
        if sys.stderr is None
        else Console(file=cast(IO[str], _Guarded(sys.stderr)))
    )


class _Guarded:
    """A text file whose errors are ignored."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
