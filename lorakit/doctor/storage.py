"""Disks and caches: free space, whether they can be written to, and shared memory."""

from __future__ import annotations

import getpass
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lorakit.data.rows import cache_dir
from lorakit.doctor.finding import Finding
from lorakit.errors import memory_size

_AREA = "storage"
_LEAST_FREE_BYTES = 5 << 30
_LEAST_SHARED_BYTES = 1 << 30
#: How long the size of a cache is added up.
_WALK_SECONDS = 0.5


def storage_findings(gpus: int) -> Iterator[Finding]:
    """The directories that a run writes to, and the compilers' caches."""
    from huggingface_hub import constants

    yield _directory("Hub cache", Path(constants.HF_HUB_CACHE), "HF_HOME")
    yield _directory("lorakit cache", cache_dir(), "LORAKIT_CACHE")
    yield _directory("working directory", Path.cwd(), None)
    yield _cache("compiler cache", _inductor_cache(), "TORCHINDUCTOR_CACHE_DIR")
    if gpus:
        yield _cache("Triton cache", _triton_cache(), "TRITON_CACHE_DIR")
    yield from _shared_memory(gpus)


def _inductor_cache() -> Path:
    """As torch._inductor chooses it."""
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(chosen or Path(tempfile.gettempdir(), f"torchinductor_{_user()}"))


def _triton_cache() -> Path:
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without an entry in /etc/passwd
        return str(os.getuid())


def _existing(path: Path) -> Path:
    """``path`` or the nearest directory above it that exists."""
    return next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))


def _is_writable(path: Path) -> bool:
    return os.access(_existing(path), os.W_OK | os.X_OK)


def _directory(name: str, path: Path, variable: str | None) -> Finding:
    try:
        free = shutil.disk_usage(_existing(path)).free
    except OSError as error:
        return Finding(_AREA, name, None, f"{path}: {error}", "warning")
    value = {"path": str(path), "free_bytes": free, "writable": _is_writable(path)}
    text = f"{path}, {memory_size(free)} free"
    change = f"export {variable}=DIRECTORY" if variable else "cd to another directory"
    if not value["writable"]:
        return Finding(_AREA, name, value, f"{text}, not writable", "warning", change)
    if free < _LEAST_FREE_BYTES:
        hint = f"delete files, or {change}"
        return Finding(_AREA, name, value, f"{text}: little", "warning", hint)
    return Finding(_AREA, name, value, text)


def _cache(name: str, path: Path, variable: str) -> Finding:
    size, whole = _size(path)
    value = {"path": str(path), "size_bytes": size, "writable": _is_writable(path)}
    text = f"{path}, {'' if whole else 'at least '}{memory_size(size)}"
    if not value["writable"]:
        hint = f"export {variable}=DIRECTORY"
        return Finding(_AREA, name, value, f"{text}, not writable", "warning", hint)
    return Finding(_AREA, name, value, text)


def _size(path: Path) -> tuple[int, bool]:
    """The bytes in ``path``, and whether there was time to add up all of them."""
    end, size = time.monotonic() + _WALK_SECONDS, 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                size += Path(folder, name).lstat().st_size
            except OSError:
                continue
        if time.monotonic() > end:
            return size, False
    return size, True


def _shared_memory(gpus: int) -> Iterator[Finding]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    total = shutil.disk_usage(folder).total
    text = memory_size(total)
    if gpus > 1 and total < _LEAST_SHARED_BYTES:
        text += ": NCCL may need more for several GPUs"
        hint = "docker run --shm-size=8g, or mount a larger /dev/shm"
        yield Finding(_AREA, "shared memory", total, text, "warning", hint)
    else:
        yield Finding(_AREA, "shared memory", total, text)
