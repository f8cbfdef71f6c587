"""A directory that is whole or absent: written beside its place, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(target: Path, *, replace: bool) -> Iterator[Path]:
    """An empty directory beside ``target`` that takes its place when the block ends well.

    With ``replace`` an existing directory is set aside, replaced and then deleted; without it a
    ``target`` that has appeared meanwhile raises FileExistsError. After an error nothing is left.
    """
    target = target.absolute()
    token = secrets.token_hex(4)
    new = target.parent / f".{target.name}.{token}.new"
    old = target.parent / f".{target.name}.{token}.old"
    new.mkdir(parents=True)
    try:
        yield new
        _flush(new)
        if replace and target.is_dir() and not target.is_symlink():
            target.rename(old)
        elif target.exists() or target.is_symlink():
            raise FileExistsError(f"{target}: exists already")
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bring the files to the disk before the rename says that they are there."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
