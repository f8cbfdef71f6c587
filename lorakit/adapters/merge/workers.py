"""Runs the jobs of a merge with a thread for each core."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from lorakit.host.resources import allowed_cores

#: Below this size, a second thread costs more than it saves.
SMALL_BYTES = 2**23
_MOST_WORKERS = 16
#: Bytes that are written between two flushes to disk.
_FLUSH_BYTES = 2**28


OnProgress = Callable[[int, int], None]
#: Returns the number of bytes that it wrote.
Job = Callable[["Buffers"], int]


class Buffers:
    """Memory of one worker, reused for every chunk, since new pages cost more than the
    arithmetic."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def get(self, use: str, count: int, dtype: torch.dtype) -> Tensor:
        """Return ``count`` uninitialized elements in the memory that belongs to ``use``."""
        size = count * dtype.itemsize
        memory = self._memory.get(use)
        if memory is None or len(memory) < size:
            memory = self._memory[use] = torch.empty(size, dtype=torch.uint8)
        return memory[:size].view(dtype)


def _workers() -> int:
    return max(1, min(allowed_cores(), _MOST_WORKERS))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Limit torch to one thread, since more would only compete with the workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_jobs(
    jobs: Iterator[Job], files: Sequence[int], total: int, on_progress: OnProgress
) -> None:
    """Run all jobs, which write ``total`` bytes to ``files`` (descriptors), with one thread per
    core. The first error stops the others and is raised."""
    lock = threading.Lock()
    failed: list[BaseException] = []
    done = 0
    stop = threading.Event()
    finished = threading.Semaphore(0)

    def work() -> None:
        nonlocal done
        buffers = Buffers()
        try:
            with torch.no_grad():
                while not stop.is_set():
                    with lock:
                        job = next(jobs, None)
                    if job is None:
                        return
                    size = job(buffers)
                    with lock:
                        done += size
        except BaseException as error:
            failed.append(error)
            stop.set()
        finally:
            finished.release()

    workers = 1 if total < SMALL_BYTES else _workers()
    threads = [threading.Thread(target=work, name="merge", daemon=True) for _ in range(workers)]
    flush = threading.Thread(target=_flush, args=(files, lambda: done, stop), daemon=True)
    with _one_thread_each():
        try:
            for thread in (*threads, flush):
                thread.start()
            for _ in threads:
                while not finished.acquire(timeout=0.25):
                    on_progress(done, total)
        finally:
            stop.set()
            for thread in (*threads, flush):
                if thread.ident is not None:
                    thread.join()
    if failed:
        raise failed[0]
    on_progress(total, total)


def _flush(files: Sequence[int], done: Callable[[], int], stop: threading.Event) -> None:
    """Flush what is written while the rest is computed. The caller flushes the last part."""
    flushed = 0
    while not stop.wait(0.05):
        if done() - flushed >= _FLUSH_BYTES:
            flushed = done()
            for handle in files:
                with suppress(OSError):  # the caller's own fsync reports it
                    getattr(os, "fdatasync", os.fsync)(handle)
