"""Tokenize a split in shards, with several processes if it has many rows."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from lorakit.data.cache import Shard
from lorakit.data.examples import Example
from lorakit.data.rows import Row, row_range
from lorakit.data.sources import Split
from lorakit.data.tokens import RowEncoder
from lorakit.errors import DataError, LorakitError
from lorakit.host.resources import allowed_cores

#: From this number of rows on, tokens go to files, and several processes are used.
MANY_ROWS = 20_000
_ROWS_PER_PROCESS = 10_000
_MAX_PROCESSES = 8
#: Rows are tokenized in batches of this size.
BATCH_ROWS = 1000

OnRows = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """A split to tokenize, and how."""

    split: Split
    to_example: Callable[[Row], Example]
    tokenizer: Any
    max_length: int
    skip_bad: bool = False

    def encode(self, shard: Shard, start: int, stop: int, on_rows: OnRows) -> None:
        """Tokenize rows ``start`` to ``stop`` into ``shard``; ``on_rows`` is called after each
        batch with its number of rows.

        Raises DataError with file and row for a row that cannot be trained on.
        """
        largest = max(self.tokenizer.get_vocab().values(), default=0)
        dtype = "<u2" if largest < 2**16 else "<i4"
        encoder = RowEncoder(self.to_example, self.tokenizer, self.max_length)
        for begin in range(start, stop, BATCH_ROWS):
            end = min(begin + BATCH_ROWS, stop)

            def skip(index: int, reason: str, begin: int = begin) -> None:
                shard.counts.skip(begin + index, reason)

            found = encoder.encode(
                row_range(self.split.rows, begin, end),
                partial(self._locate, begin),
                skip if self.skip_bad else None,
            )
            shard.append(found, dtype, begin)
            on_rows(end - begin)

    def _locate(self, start: int, index: int) -> str:
        return self.split.locate(start + index)


def encode_shards(job: Job, on_progress: OnRows) -> list[Shard]:
    """Tokenize all rows of the split, in order; ``on_progress`` is called with the total done.

    Raises the DataError of the first bad row.
    """
    rows, done = len(job.split), 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        on_progress(done)

    processes = process_count(rows)
    shards = [Shard.empty(in_memory=rows < MANY_ROWS) for _ in range(processes)]
    if processes == 1:
        job.encode(shards[0], 0, rows, count)
        shards[0].flush()
        return shards
    with _workers(job, shards) as workers:
        _collect(workers, count)
    return shards


def process_count(rows: int) -> int:
    """The number of processes for ``rows``. It is 1 except on Linux: elsewhere forking is unsafe,
    and only the tokenizer's threads run in parallel."""
    if rows < MANY_ROWS or sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return max(1, min(allowed_cores(), _MAX_PROCESSES, rows // _ROWS_PER_PROCESS))


@dataclass
class _Worker:
    """``messages`` are ("rows", N), and finally one of ("done", dtypes, counts), ("refused", TEXT)
    and ("failed", TRACEBACK)."""

    process: Any
    messages: Connection
    shard: Shard
    failure: Exception | None = None
    ended: bool = False

    def receive(self) -> int:
        """Receive a message and return the number of rows that it reports as done."""
        try:
            kind, *values = self.messages.recv()
        except EOFError:
            self.process.join()
            kind, values = "failed", [f"killed, exit code {self.process.exitcode}"]
        if kind == "rows":
            return int(values[0])
        self.ended = True
        if kind == "done":
            self.shard.dtypes, self.shard.counts = values
        elif kind == "refused":
            self.failure = DataError(values[0])
        else:
            self.failure = LorakitError(f"a tokenization process failed: {values[0]}")
        return 0


@contextmanager
def _workers(job: Job, shards: list[Shard]) -> Iterator[list[_Worker]]:
    """Fork one process per shard; none of them outlives the block."""
    context = multiprocessing.get_context("fork")
    workers: list[_Worker] = []
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    try:
        for index, shard in enumerate(shards):
            start, stop = (len(job.split) * i // len(shards) for i in (index, index + 1))
            ours, theirs = context.Pipe(duplex=False)
            inherited = [ours, *(worker.messages for worker in workers)]
            arguments = (job, shard, start, stop, theirs, inherited)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            workers.append(_Worker(process, ours, shard))
        yield workers
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.process.join()
            worker.messages.close()
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _collect(workers: list[_Worker], count: OnRows) -> None:
    """Wait until all workers are done, or until one has failed and all before it have finished."""
    while running := [worker for worker in workers if not worker.ended]:
        ready = wait([worker.messages for worker in running])
        for worker in running:
            if worker.messages in ready:
                count(worker.receive())
        for worker in workers:
            if worker.failure is not None:
                raise worker.failure
            if not worker.ended:
                break


def _work(
    job: Job, shard: Shard, start: int, stop: int, out: Connection, inherited: list[Connection]
) -> None:
    gc.freeze()  # otherwise garbage collection would copy the parent's memory, page by page
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent terminates its children
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for connection in inherited:  # so that writing fails once the parent is gone
        connection.close()
    try:
        job.encode(shard, start, stop, lambda rows: out.send(("rows", rows)))
        shard.flush()
        out.send(("done", shard.dtypes, shard.counts))
    except DataError as error:
        out.send(("refused", str(error)))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone
    except Exception:
        out.send(("failed", traceback.format_exc()))
