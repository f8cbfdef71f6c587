"""A directory that is whole or absent: written beside its place, then renamed."""

from __future__ import annotations

import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_beside(target: Path, *, replace: bool) -> Iterator[Path]:
    """An empty directory beside ``target`` that takes its place when the block ends well.

    With ``replace`` an existing directory is set aside, replaced and then deleted; without it a
    ``target`` that has appeared meanwhile raises FileExistsError. After an error nothing is left;
    what a killed process left is deleted by the next that writes ``target``, and what it had set
    aside, if nothing had taken its place yet, is put back.
    """
    target = target.absolute()
    token = secrets.token_hex(4)
    new = target.parent / f".{target.name}.{token}.new"
    old = target.parent / f".{target.name}.{token}.old"
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    new.mkdir()
    lock = os.open(new, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        os.close(lock)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Undo what a killed process left beside ``target``: a living one holds the lock."""
    for left in _left(target, ".new"):
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)
    for left in _left(target, ".old"):
        if left.with_suffix(".new").exists():
            continue
        if target.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:  # killed between the two renames
            with suppress(OSError):
                left.rename(target)


def _left(target: Path, end: str) -> Iterator[Path]:
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{end}"):
        if re.fullmatch(r"[0-9a-f]{8}", left.name[len(target.name) + 2 : -len(end)]):
            yield left


def _flush(folder: Path) -> None:
    """Bring the files to the disk before the rename says that they are there."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
