"""Command lines as real processes that a test can signal. ``Launcher`` starts one Python that has
imported everything and forks a child for each command, which is as fast as a single `python -m
lorakit` for a dozen commands.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SERVER = """
import json, os, sys
import datasets, transformers.models.bert.modeling_bert, transformers.models.llama.modeling_llama
import lorakit.training.run
from tests.training.processes import in_child
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os._exit(in_child(json.loads(line)))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Ended:
    """``code`` is the negative signal number if a signal killed the process."""

    code: int
    out: str
    err: str


#: The exit code of a process that could not get its disk.
NO_DISK = 77


class Launcher:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)

    def run(
        self,
        arguments: Sequence[object],
        *,
        signal_when: Callable[[], bool] | None = None,
        delay_seconds: float = 0.0,
        number: int = signal.SIGKILL,
        at_call: tuple[str, int] | None = None,
        at_event: tuple[str, str, int] | None = None,
        stderr: str | None = None,
        max_file_bytes: int | None = None,
        disk: tuple[Path, int, Path] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Ended:
        """Run ``lorakit ARGUMENTS`` to its end.

        The signal is sent ``delay_seconds`` after ``signal_when()`` turns true, or by the process
        to itself: at the n-th call of a public function (``at_call`` = ("module:name", n)), or just
        before the n-th of Python's audit events that concerns a path like ``pattern`` (``at_event``
        = ("os.rename", pattern, n)). No file may exceed ``max_file_bytes``. ``disk`` =
        (directory, bytes, copy): the directory is a disk of this size, which only the process sees
        and whose contents are copied when it ends.
        """
        out, err = self._folder / "stdout", stderr or str(self._folder / "stderr")
        request = {
            "arguments": [str(argument) for argument in arguments],
            "stdout": str(out),
            "stderr": err,
            "at_call": at_call,
            "at_event": at_event,
            "signal": int(number),
            "max_file_bytes": max_file_bytes,
            "disk": disk and [str(disk[0]), disk[1], str(disk[2])],
            "environment": environment or {},
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        pid = int(self._server.stdout.readline())
        if signal_when is not None:
            while not signal_when() and _alive(pid):
                time.sleep(0.002)
            time.sleep(delay_seconds)
            if _alive(pid):
                os.kill(pid, number)
        code = int(self._server.stdout.readline())
        return Ended(code, out.read_text(), "" if stderr else Path(err).read_text())


def in_child(request: dict[str, Any]) -> int:
    """Run a command in a forked child and return its exit code."""
    os.environ.update(request["environment"])
    for descriptor, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = os.open(name, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    if request["at_call"]:
        _signal_at_call(*request["at_call"], request["signal"])
    if request["at_event"]:
        _signal_at_event(*request["at_event"], request["signal"])
    if request["disk"]:
        directory, size, copy = request["disk"]
        if not mount_small_disk(directory, size):
            return NO_DISK
    from lorakit.cli.main import run

    if limit := request["max_file_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    code = run(request["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    if request["disk"]:
        shutil.copytree(directory, copy)
    return code


def mount_small_disk(directory: str, size: int) -> bool:
    """Mount a disk of this many bytes in a namespace of this process; False if not permitted."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    user, group, new_user, new_mounts = os.getuid(), os.getgid(), 0x10000000, 0x20000
    if libc.unshare(new_user | new_mounts):
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError:
        return False
    options = f"size={size}".encode()
    return not libc.mount(b"none", directory.encode(), b"tmpfs", 0, options)


def _signal_at_call(target: str, call: int, number: int) -> None:
    module, _, name = target.partition(":")
    owner: Any = __import__(module, fromlist=["_"])
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, last, counted)


def _signal_at_event(event: str, pattern: str, count: int, number: int) -> None:
    left = count

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if name != event or not any(re.search(pattern, str(each)) for each in arguments):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
