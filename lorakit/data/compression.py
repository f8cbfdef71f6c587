"""Text files that may be compressed with gzip or zstandard, read as UTF-8."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorakit.errors import DataError

#: The suffixes of compressed files, after that of the format.
COMPRESSED = (".gz", ".zst")
#: Raised by reading and decompressing a file.
READ_ERRORS = (OSError, EOFError, zlib.error)
_LFS_POINTER = b"version https://git-lfs"


def without_compression(name: str) -> str:
    """The name of a file without the suffix of its compression."""
    return name.removesuffix(".gz").removesuffix(".zst")


def decompressed(file: Path, handle: BinaryIO) -> BinaryIO:
    """Decompress the open ``file`` if it is compressed. Raises DataError for a Git LFS pointer,
    UTF-16 and UTF-32."""
    lines: Any = handle
    if file.suffix == ".gz":
        lines = gzip.GzipFile(fileobj=handle)
    elif file.suffix == ".zst":
        lines = io.BufferedReader(_Zstandard(handle))
    head = lines.read(len(_LFS_POINTER))
    lines.seek(0)
    if head.startswith(_LFS_POINTER):
        raise DataError(f"{file}: a Git LFS pointer, not the data itself; hint: run git lfs pull")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:4]:
        raise DataError(f"{file}: the text is UTF-16 or UTF-32; allowed: UTF-8")
    return cast(BinaryIO, lines)


def as_text(file: Path, handle: BinaryIO) -> io.TextIOWrapper:
    """The text of the open ``file``. Raises the same errors as ``decompressed``."""
    return io.TextIOWrapper(decompressed(file, handle), encoding="utf-8-sig", newline="")


class _Zstandard(io.RawIOBase):
    """What a file of zstandard frames contains; it can be read on or from the beginning."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Return to the beginning, the only place that can be found."""
        import pyarrow

        assert (offset, whence) == (0, os.SEEK_SET), "compressed text is read in order"
        own = io.FileIO(os.dup(self._handle.fileno()))  # which the stream closes when it ends
        own.seek(0)
        self._stream = pyarrow.CompressedInputStream(own, "zstd")
        self._position = 0
        return 0
