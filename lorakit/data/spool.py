"""Bytes that are written once and read anywhere, and the directory for what can be made again."""

from __future__ import annotations

import io
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from lorakit.errors import DataError

#: What is held in memory of a split's rows; more goes to files.
IN_MEMORY_BYTES = 64 << 20
_OTHER_OPEN_FILES = 512


def cache_dir() -> Path:
    """``$LORAKIT_CACHE``, else ``$XDG_CACHE_HOME/lorakit``, else ``~/.cache/lorakit``."""
    if own := os.environ.get("LORAKIT_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "lorakit"


def scratch_dir() -> Path | None:
    """Where files without a name lie: in the cache directory, or if nothing can be written there,
    in that of temporary files (None)."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def scratch_file() -> BinaryIO:
    """A file without a name, so that it is gone with the process however that ends."""
    return tempfile.TemporaryFile(dir=scratch_dir())


@contextmanager
def needs_room(what: str) -> Iterator[None]:
    """Raise DataError in place of a write's OSError: the disk is full, or broken."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{what}: cannot be written on the disk of {cache_dir()}: {error}; "
            "LORAKIT_CACHE names another directory"
        ) from error


class Room:
    """What may still be held in memory: ``IN_MEMORY_BYTES`` for the files of a split together."""

    def __init__(self) -> None:
        self.left = IN_MEMORY_BYTES

    def has(self, size: int) -> bool:
        return size <= self.left

    def take(self, size: int) -> None:
        self.left -= size


def allow_open_files(count: int) -> None:
    """Let the process hold so many files open, as far as the system allows it: each file of a
    split that is not held in memory stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_OPEN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Source(Protocol):
    """Bytes that can be read anywhere, also by forked processes at the same time."""

    def read(self, start: int, stop: int) -> bytes: ...


class MemorySource:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, start: int, stop: int) -> bytes:
        return self._data[start:stop]


class FileSource:
    """An open file, read without mapping it: a mapped one would count as memory, and a file cut
    short would end the process. Raises DataError if it changes after it was opened."""

    def __init__(self, handle: BinaryIO, name: str) -> None:
        self._handle = handle
        self._name = name
        self._opened = self._stamp()

    def read(self, start: int, stop: int) -> bytes:
        data = os.pread(self._handle.fileno(), stop - start, start)
        if self._stamp() != self._opened or len(data) != stop - start:
            raise DataError(f"{self._name}: the file has changed since it was first read")
        return data

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self._handle.fileno())
        return found.st_size, found.st_mtime_ns


class Spool:
    """Bytes on their way: in memory while ``room`` has space for them, and then in a scratch
    file."""

    def __init__(self, room: Room) -> None:
        self._file: BinaryIO = io.BytesIO()
        self._size = 0
        self._room = room

    def write(self, data: bytes) -> None:
        """Append. Raises OSError if the disk is full."""
        self._size += len(data)
        if isinstance(self._file, io.BytesIO) and not self._room.has(self._size):
            file = scratch_file()
            file.write(self._file.getbuffer())
            self._file = file
        self._file.write(data)

    def finished(self, name: str) -> Source:
        if isinstance(self._file, io.BytesIO):
            self._room.take(self._size)
            return MemorySource(self._file.getvalue())
        self._file.flush()
        return FileSource(self._file, name)
