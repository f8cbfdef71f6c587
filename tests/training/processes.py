"""Command lines as real processes that a test can signal. One Python, which has imported everything,
forks a child for each command: a dozen of them are as fast as a single `python -m lorakit`.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

_SERVER = """
import gc, json, os, sys
import datasets, transformers.models.bert.modeling_bert, transformers.models.llama.modeling_llama
import lorakit.cli.main, lorakit.training.run
from tests.training.processes import in_child
gc.freeze()  # otherwise each child's garbage collection would copy its memory
for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
        pid, status = os.waitpid(request, os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        in_child(request)
"""


@dataclass
class Ended:
    """``code`` is the negative signal number if a signal killed the process."""

    code: int
    out: str
    err: str


#: The exit code of a process that could not get its disk.
NO_DISK = 77


class _Server:
    """The Python that forks; it ends with this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        atexit.register(self._close)

    def ask(self, request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@cache
def _server() -> _Server:
    return _Server()


class Forked:
    """A child that carries out a request: see ``in_child``."""

    def __init__(self, out: Path, err: Path, environment: dict[str, str], **request: Any) -> None:
        """Start in the current directory, with the variables of this process and more ones."""
        self._out, self._err = out, err
        self._pid = _server().ask(
            {
                "stdout": str(out),
                "stderr": str(err),
                "directory": str(Path.cwd()),
                "environment": {**os.environ, **environment},
                **request,
            }
        )
        self._code: int | None = None

    def is_alive(self) -> bool:
        if self._code is None:
            self._code = _server().ask(self._pid)
        return self._code is None

    def send_signal(self, number: int) -> None:
        if self.is_alive():
            os.kill(self._pid, number)

    def wait(self, seconds: float | None = None) -> Ended:
        deadline = None if seconds is None else time.monotonic() + seconds
        while self.is_alive():
            if deadline is not None and time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
                raise TimeoutError(f"still running: {self._err.read_text()}")
            time.sleep(0.005)
        assert self._code is not None
        err = self._err.read_text() if self._err.is_file() else ""
        return Ended(self._code, self._out.read_text(), err)


class Launcher:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

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
        process = Forked(
            self._folder / "stdout",
            Path(stderr) if stderr else self._folder / "stderr",
            command=["-m", "lorakit", *map(str, arguments)],
            at_call=at_call,
            at_event=at_event,
            signal=int(number),
            max_file_bytes=max_file_bytes,
            disk=disk and [str(disk[0]), disk[1], str(disk[2])],
            environment={"OMP_NUM_THREADS": "1", **(environment or {})},
        )
        if signal_when is not None:
            while not signal_when() and process.is_alive():
                time.sleep(0.002)
            time.sleep(delay_seconds)
            process.send_signal(number)
        return process.wait()


def in_child(request: dict[str, Any]) -> NoReturn:
    """Run ``python COMMAND``, which is ``-m lorakit`` or ``-c CODE`` with arguments, in a forked
    child, and exit."""
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for descriptor, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = os.open(name, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    if request.get("at_call"):
        _signal_at_call(*request["at_call"], request["signal"])
    if request.get("at_event"):
        _signal_at_event(*request["at_event"], request["signal"])
    if request.get("no_locks"):
        sys.addaudithook(_without_locks)
    if disk := request.get("disk"):
        directory, size, copy = disk
        if not mount_small_disk(directory, size):
            os._exit(NO_DISK)
    if limit := request.get("max_file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    code = _run(*request["command"])
    if disk:
        shutil.copytree(directory, copy)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without seconds of deleting what PyTorch has imported


def _run(option: str, what: str, *arguments: str) -> int:
    from lorakit.cli.main import run

    if (option, what) == ("-m", "lorakit"):
        return run(arguments)
    sys.argv = [option, *arguments]
    try:
        exec(what, {"__name__": "__main__"})
    except SystemExit as stop:
        return int(stop.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


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


def _without_locks(event: str, _arguments: tuple[Any, ...]) -> None:
    """An audit hook: files have no locks, as on some file systems that hosts share."""
    if event == "fcntl.flock":
        raise OSError(errno.ENOLCK, "no locks available")


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
