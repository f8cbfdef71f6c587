"""Files that a command writes for the user."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lorakit.errors import UserError


def check_writable(option: str, path: Path | None) -> None:
    """Raise UserError, before any work is done, if ``path`` cannot become a file."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path}: is a directory; allowed: a file")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: the directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {path}: no permission to write in {path.parent}")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 beside ``path``, then rename: the file is whole or as it was."""
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        Path(beside).chmod(0o666 & ~mask)
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
