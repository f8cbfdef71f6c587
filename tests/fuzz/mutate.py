"""Seeded mutations of files, and what must hold after each."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

#: No case may take longer.
SECONDS = 10
#: No case may take more memory.
BYTES = 4 << 30
ODD: list[Any] = [
    None, True, -1, 0, 1, 2, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "1", "nan", "../../escape", "/etc/passwd", "a\x00b", "\x1b[31mred\x1b[0m",
    "\u202e", "\ud800", "x" * 100_000, "(a+)+$", "{}", [], [[]], [None], [1, "a"], {}, {"a": {}},
    {"__class__": "os.system"}, ["a"] * 1000,
]  # fmt: skip


class TooLong(BaseException):
    """Not an Exception, which the program might handle."""


@contextmanager
def limited() -> Iterator[None]:
    """Raise TooLong if the block takes longer than ``SECONDS``, and MemoryError if it takes
    more than ``BYTES``."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TooLong(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def run_cases(count: int, case: Callable[[int], None]) -> None:
    """Run all cases, and report every one that fails by its number."""
    failures = []
    for number in range(count):
        try:
            case(number)
        except (Exception, TooLong) as error:
            failures.append(f"case {number}: {type(error).__name__}: {str(error)[:600]}")
    assert not failures, f"{len(failures)} of {count} cases failed\n" + "\n".join(failures[:20])


def listing(*folders: Path) -> dict[str, tuple[int, int]]:
    """The files and directories in ``folders``, with their sizes and times."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            stat = path.lstat()
            found[str(path)] = (stat.st_size, stat.st_mtime_ns) if path.is_file() else (0, 0)
    return found


def assert_plain(text: str) -> None:
    """Nothing that a terminal would obey, and no traceback."""
    assert all(c.isprintable() or c in "\n\r\t" for c in text), ascii(text)
    assert "Traceback" not in text
    assert "the traceback is in" not in text


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at = draw.randrange(len(data) + 1)
        to = min(len(data), at + draw.choice([1, 2, 8, 64, 1000]))
        how = draw.randrange(6)
        if how == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            data[at:to] = b""
        elif how == 2:
            data[at:at] = draw.randbytes(draw.choice([1, 8, 100]))
        elif how == 3:
            data[at:at] = data[at:to]
        elif how == 4:
            data[at:to] = bytes(to - at)
        else:
            del data[at:]
    return bytes(data)


def mutate_value(value: Any, draw: random.Random) -> Any:
    """Replace, remove or add something somewhere in a JSON value."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key, how = draw.choice(list(value)), draw.random()
        if how < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.2:
            return {**value, draw.choice(["x", "", key + "x", "../x", "\x1b[1m"]): draw.choice(ODD)}
        return {**value, key: mutate_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at, how = draw.randrange(len(value)), draw.random()
        if how < 0.1:
            return value[:at] + value[at + 1 :]
        if how < 0.2:
            return [*value, value[at]]
        return [*value[:at], mutate_value(value[at], draw), *value[at + 1 :]]
    if isinstance(value, int | float) and draw.random() < 0.4:
        return draw.choice([value + 1, -value, value * 1000, float(value), str(value)])
    return draw.choice(ODD)


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    value = json.loads(content)
    for _ in range(draw.choice([1, 1, 2])):
        value = mutate_value(value, draw)
    return json.dumps(value).encode()


def mutate_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Change the header, or the size that the file states for it."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    how = draw.randrange(5)
    if how == 0:
        wrong = draw.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
        return wrong.to_bytes(8, "little") + header + data
    if how == 1:
        data = data[: draw.randrange(len(data) + 1)] if draw.random() < 0.5 else data + data
    elif how == 2:
        data = draw.randbytes(len(data))
    elif how == 3:
        header = mutate_bytes(header, draw)
    else:
        header = mutate_json(header, draw)
    return len(header).to_bytes(8, "little") + header + data


def mutate_file(file: Path, draw: random.Random) -> None:
    """Change a file's contents, or put something else in its place."""
    content, how = file.read_bytes(), draw.random()
    if how < 0.15:
        file.unlink()
        _replace(file, draw)
    elif how < 0.35:
        file.write_bytes(mutate_bytes(content, draw))
    elif file.suffix == ".safetensors":
        file.write_bytes(mutate_safetensors(content, draw))
    elif file.suffix == ".json":
        file.write_bytes(mutate_json(content, draw))
    else:
        file.write_bytes(mutate_bytes(content, draw))


def _replace(file: Path, draw: random.Random) -> None:
    others: list[Callable[[], object]] = [
        lambda: None,
        file.mkdir,
        file.touch,
        lambda: file.symlink_to("/etc/passwd"),
        lambda: file.symlink_to(file),
        lambda: file.symlink_to("/dev/zero"),
        lambda: os.mkfifo(file),
        lambda: file.write_bytes(b"\x80\x04\x8c\x02os\x8c\x06system\x93."),
        lambda: file.write_text("[" * 100_000),
        lambda: os.truncate(file, 0) if file.exists() else file.write_bytes(bytes(100)),
    ]
    draw.choice(others)()
