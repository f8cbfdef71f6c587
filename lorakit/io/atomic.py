"""Atomic writes: a file or directory is either complete or unchanged.

New content is written to a temporary name next to the target, flushed to disk (fsync) and renamed.
The temporary ``.NAME.TOKEN.new`` is locked while its writer is running, so that the next writer can
recognize the leftovers of a killed process and delete them.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

#: ``new`` is not yet renamed to NAME; ``old`` was moved aside; ``removed`` is being deleted.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<state>new|old|removed)")


@contextmanager
def atomic_directory(target: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes ``target`` if the block succeeds.

    With ``replace`` an existing directory is moved aside and deleted after the rename. Raises
    FileExistsError if ``target`` exists otherwise. After an error ``target`` is unchanged.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    new = _temporary(target, "new")
    old = new.with_suffix(".old")
    new.mkdir()
    try:
        with _locked(new):
            yield new
            _flush_tree(new)
            if replace and target.is_dir() and not target.is_symlink():
                target.rename(old)
            elif target.exists() or target.is_symlink():
                raise FileExistsError(f"{target}: already exists")
            try:
                new.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
            _flush(target.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file that replaces ``target`` if the block succeeds."""
    target = target.absolute()
    remove_leftovers(target.parent, target.name)
    new = _temporary(target, "new")
    new.touch(exist_ok=False)
    try:
        with _locked(new):
            yield new
            _flush(new)
            new.replace(target)
            _flush(target.parent)
    finally:
        new.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write ``text`` to ``target`` atomically, as UTF-8 with ``\\n`` line ends."""
    with atomic_file(target) as new:
        new.write_text(text, encoding="utf-8", newline="\n")


def remove_directory(target: Path) -> None:
    """Delete a directory so that it is never seen half-deleted."""
    removed = _temporary(target.absolute(), "removed")
    target.rename(removed)
    shutil.rmtree(removed)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete the leftovers of killed processes in ``folder``: of the target ``name``, or of every
    target.

    A directory that was moved aside and not replaced before the process died is moved back.
    """
    left = [path for path in folder.glob(".*") if _target_name(path) is not None]
    for path in sorted(left, key=lambda path: path.suffix):  # .new before the .old it replaces
        if name not in (None, _target_name(path)):
            continue
        if path.suffix == ".old":
            _undo_move(path)
        elif path.suffix == ".removed" or not _is_locked(path):
            _delete(path)


def _target_name(path: Path) -> str | None:
    """The name of the target that a temporary file belongs to; None for any other file."""
    found = _TEMPORARY.fullmatch(path.name)
    return found["name"] if found else None


def _undo_move(old: Path) -> None:
    if old.with_suffix(".new").exists():  # its writer is still running
        return
    target = old.with_name(_target_name(old) or "")
    if target.exists():
        _delete(old)
    else:  # killed between the two renames
        with suppress(OSError):
            old.rename(target)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _temporary(target: Path, state: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{state}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _flush_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
