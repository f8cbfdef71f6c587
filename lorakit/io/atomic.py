"""Atomic writes: a file or directory is either complete or unchanged.

New content is written to a temporary name next to the target, flushed to disk (fsync) and renamed.
The temporary ``.NAME.TOKEN.new`` is locked while its writer is running, so that the next writer can
recognize the leftovers of a killed process and delete them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from lorakit.errors import UserError, WriteFailed, check_printable

#: ``new`` is not yet renamed to NAME; ``old`` was moved aside; ``removed`` is being deleted.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<state>new|old|removed)")
_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
}


@contextmanager
def atomic_directory(target: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes ``target`` if the block succeeds.

    With ``replace`` an existing directory is moved aside and deleted after the rename. Raises
    FileExistsError if ``target`` exists otherwise. After an error ``target`` is unchanged.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    with _locked_temporary(target, Path.mkdir) as new:
        old = new.with_suffix(".old")
        try:
            yield new
            _flush_tree(new)
            while not _put(new, target, old, replace=replace):
                shutil.rmtree(old, ignore_errors=True)
            _flush(target.parent)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield the path of an empty temporary file that becomes ``target`` if the block succeeds.

    Without ``replace``, an existing ``target`` is kept, and the new file is deleted.
    """
    target = target.absolute()
    remove_leftovers(target.parent, target.name)
    with _locked_temporary(target, Path.touch) as new:
        try:
            yield new
            _flush(new)
            if replace or not _link(new, target):
                new.replace(target)
            _flush(target.parent)
        finally:
            new.unlink(missing_ok=True)


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Turn the OSError of a failed write in the block into WriteFailed, whose message starts with
    ``what``."""
    try:
        yield
    except OSError as error:
        reason, hint = error.strerror or error, _ADVICE.get(error.errno or 0, "correct this")
        raise WriteFailed(f"{what}: cannot be written: {reason}", hint=hint) from error


@contextmanager
def os_errors(kind: type[Exception], what: Path) -> Iterator[None]:
    """Raise the OSError that a library in Rust describes in an exception of class ``kind``, such as
    that of a full disk."""
    try:
        yield
    except kind as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if type(error) is not kind or found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(what)) from error


def check_name(target: Path) -> None:
    """Raise OSError or ValueError if nothing can be written to a path of this name: it is too long,
    has control characters, or a parent is a file."""
    check_printable(target)
    target = target.absolute()
    folder = next(parent for parent in target.parents if parent.exists())
    with suppress(FileNotFoundError):
        (folder / _temporary(target, "removed").name).lstat()


def creation_problem(folder: Path) -> str | None:
    """Why a directory cannot be created or written to, as far as that can be checked without
    trying; None if no problem was found."""
    try:
        check_name(folder)
        found = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:
        return f"cannot be created: {getattr(error, 'strerror', None) or error}"
    if not found.is_dir():
        return f"{found} is a file"
    if not os.access(found, os.W_OK | os.X_OK):
        return f"no write permission in {found}"
    return None


def check_new(output: Path, overwrite: bool) -> None:
    """Raise UserError if ``output`` exists, unless it is a file and ``overwrite`` is set, or if its
    name has control characters."""
    check_printable(output, "--output")
    if output.is_dir():
        raise UserError(f"--output {output}: is a directory; allowed: a file")
    if output.exists() and not output.is_file():
        raise UserError(f"--output {output}: is a device or a pipe; allowed: a file")
    if output.exists() and not overwrite:
        raise UserError(
            f"--output {output}: already exists; hint: choose another, or pass --overwrite"
        )
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: directory {output.parent} does not exist")


def write_text(target: Path, text: str) -> None:
    """Write ``text`` to ``target`` atomically, as UTF-8 with ``\\n`` line ends."""
    with atomic_file(target) as new:
        new.write_text(text, encoding="utf-8", newline="\n")


def remove_path(target: Path) -> None:
    """Delete a directory, so that it is never seen half-deleted, or a file or link if there is
    one."""
    removed = _temporary(target.absolute(), "removed")
    with suppress(FileNotFoundError):
        target.rename(removed)
        if removed.is_dir() and not removed.is_symlink():
            shutil.rmtree(removed)
        else:
            removed.unlink()


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
        elif path.suffix == ".removed":
            _delete(path)
        else:
            _delete_unlocked(path)


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
def _locked_temporary(target: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Create a temporary for ``target``, locked inside the block.

    Another writer may delete it as a leftover before it is locked. It is then created again.
    """
    while True:
        new = _temporary(target, "new")
        create(new)
        with suppress(FileNotFoundError):
            handle = os.open(new, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if new.exists():
                break
            os.close(handle)
    try:
        yield new
    finally:
        os.close(handle)


def _link(new: Path, target: Path) -> bool:
    """Link ``target`` to ``new`` unless it exists. False on a file system without hard links."""
    try:
        target.hardlink_to(new)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


def _put(new: Path, target: Path, old: Path, *, replace: bool) -> bool:
    """Rename ``new`` to ``target``, moving an existing directory to ``old``.

    False if another writer's directory came in between. Raises FileExistsError if ``target`` exists
    and is not to be replaced.
    """
    with suppress(FileNotFoundError):  # absent, or another writer has just moved it aside
        is_directory = stat.S_ISDIR(target.lstat().st_mode)
        if not (replace and is_directory):
            raise FileExistsError(f"{target}: already exists")
        target.rename(old)
    try:
        new.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        if old.exists():
            old.rename(target)
        raise
    return True


def _delete_unlocked(path: Path) -> None:
    """Delete a temporary whose writer is no longer running."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        with suppress(OSError):  # locked, or a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _delete(path)
    finally:
        os.close(handle)


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
