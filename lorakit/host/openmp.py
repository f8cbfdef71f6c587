"""Keep idle OpenMP threads from spinning while other processes need the cores.

A thread of libgomp (the OpenMP runtime of torch's Linux wheels) that waits for the rest of its
team spins for 300,000 iterations before it sleeps. On an idle machine that saves wake-ups. On a
busy one, the spinning threads occupy the cores that working threads need, and training on the CPU
becomes several times slower.

The spin count can only be set before torch loads, when it is unknown what else will run. But
libgomp spins for at most 100 iterations while a process has more OpenMP threads than cores. So a
watcher measures how long the runnable threads of this process wait for a core, and while they do,
it keeps a second team of threads asleep.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

#: Environment variables that decide how threads wait; if the user sets one, it is respected.
_DECIDED_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_TASKS, _STAT = Path("/proc/self/task"), Path("/proc/stat")
_INTERVAL_SECONDS = 0.5
#: Contention: the threads of this process together wait for a core for more than this share of the
#: time, and other processes use more than this share of the cores. A process with more threads than
#: cores does not contend with itself.
_WAITING_SHARE, _OTHERS_SHARE = 0.2, 0.1
#: Without contention for this long, the threads may spin again.
_QUIET_SECONDS = 3.0

_active = threading.Lock()


@contextmanager
def yield_cores() -> Iterator[None]:
    """Watch for competing processes during the block; does nothing except on Linux.

    If OMP_WAIT_POLICY, GOMP_SPINCOUNT or KMP_BLOCKTIME is set, that setting decides. Nested blocks
    share one watcher.
    """
    decided = any(name in os.environ for name in _DECIDED_BY)
    if decided or not (_TASKS.is_dir() and _STAT.is_file()) or not _active.acquire(blocking=False):
        yield
        return
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(stop,), name="lorakit-openmp", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        _active.release()


def _watch(stop: threading.Event) -> None:
    team: _SleepingTeam | None = None
    quiet_seconds = 0.0
    before = Sample.take()
    while not stop.wait(_INTERVAL_SECONDS):
        now = Sample.take()
        contended = now.contended_since(before)
        quiet_seconds = 0.0 if contended else quiet_seconds + now.at - before.at
        before = now
        if team is None and contended and _has_torch():
            team = _SleepingTeam()
        elif team is not None and quiet_seconds > _QUIET_SECONDS:
            team.end()
            team = None
    if team is not None:
        team.end()


@dataclass(frozen=True)
class Sample:
    """Times in seconds; all but ``at`` (the monotonic clock) count from an arbitrary start.

    ``waited`` is how long each thread has been runnable without a core, ``used`` the CPU time of
    this process, ``busy`` how long its allowed ``cores`` have been busy with any process.
    """

    at: float
    waited: Mapping[str, float]
    used: float
    busy: float
    cores: int

    @classmethod
    def take(cls) -> Sample:
        allowed = os.sched_getaffinity(0)
        return cls(
            time.monotonic(), _waited_seconds(), time.process_time(), _busy_seconds(allowed),
            len(allowed),
        )  # fmt: skip

    def contended_since(self, before: Sample) -> bool:
        seconds = self.at - before.at
        waited = sum(value - before.waited.get(task, value) for task, value in self.waited.items())
        others = self.cores_of_others(before)
        return waited > _WAITING_SHARE * seconds and others > _OTHERS_SHARE * self.cores

    def cores_of_others(self, before: Sample) -> float:
        """How many of the allowed cores other processes have used on average since ``before``."""
        others = self.busy - before.busy - (self.used - before.used)
        return max(0.0, others) / max(self.at - before.at, 1e-9)


def _waited_seconds() -> dict[str, float]:
    found = {}
    for task in _TASKS.iterdir():
        try:
            found[task.name] = int((task / "schedstat").read_text().split()[1]) * 1e-9
        except (OSError, IndexError, ValueError):  # the thread has ended, or no such statistics
            continue
    return found


def _busy_seconds(cores: set[int]) -> float:
    """The time that ``cores`` were not idle, including time stolen from a virtual machine."""
    ticks = 0
    for line in _STAT.read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _has_torch() -> bool:
    """Whether torch is imported completely: after Ctrl-C during its import, using it crashes."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


class _SleepingTeam:
    """A thread that starts a second OpenMP team and then sleeps until ``end``."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lorakit-openmp-team", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        import torch

        # One parallel region starts the team; it needs more elements than a single thread handles.
        torch.zeros(torch.get_num_threads() << 16).sin_()
        self._end.wait()

    def end(self) -> None:
        self._end.set()
        self._thread.join()
