"""Rows split over the launcher's processes, and results gathered from them.

Each process loads the model on its own device (``cuda:LOCAL_RANK``) and takes every n-th row.

Failures propagate: a process that fails sets a flag in the group's store, which the others check
between batches, and reports its exit code in the next exchange. So none of them waits for one that
has exited, and only one prints the error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from lorakit.distributed.group import (
    ConnectionLost,
    abort_nccl,
    count_in_store,
    destroy_process_group,
    has_group,
    host_group,
    init_process_group,
    is_in_store,
    is_main,
    rank_and_world_size,
    set_in_store,
)
from lorakit.distributed.launcher import is_launched, launch_id
from lorakit.errors import LorakitError

T = TypeVar("T")
_FAILED = "lorakit/failed"
_LOST = "lorakit/lost"
_STOPPING = "lorakit/stopping"


class PeerFailed(Exception):
    """Another process failed while this one was between two batches."""

    def __init__(self) -> None:
        super().__init__("another process failed")


class _Abort(Exception):
    """Raised in every process after a failure; ``rank`` is the lowest that failed."""

    def __init__(self, rank: int, exit_code: int) -> None:
        super().__init__(f"process {rank} failed")
        self.rank, self.exit_code = rank, exit_code


def shard(total: int) -> range:
    """This process's rows out of ``total``: every world_size-th, starting at its rank. Every row
    belongs to exactly one process, whether or not ``total`` is divisible."""
    rank, world_size = rank_and_world_size()
    return range(rank, total, world_size)


def unshard(shards: Sequence[Sequence[T]]) -> list[T]:
    """Results for all rows in their original order, from one sequence for each ``shard``."""
    total, world_size = sum(map(len, shards)), len(shards)
    rows: list[Any] = [None] * total
    for rank, results in enumerate(shards):
        rows[rank::world_size] = results  # Python raises ValueError if the lengths differ
    return rows


def gather(value: T) -> list[T]:
    """The ``value`` of every process, by rank, on all of them."""
    return _exchange(value, None)


def run_on_main(work: Callable[[], T]) -> T:
    """Call ``work`` in the main process and return its result in all of them."""
    is_first = rank_and_world_size()[0] == 0
    return gather(work() if is_first else None)[0]  # type: ignore[return-value]


def largest(values: Sequence[int]) -> list[int]:
    """The largest of each value over all processes, which all pass as many."""
    return [max(column) for column in zip(*gather(list(values)), strict=True)]


@contextmanager
def first_on_each_host() -> Iterator[None]:
    """Let one process of each host run the block before the others do."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        yield
        gather(None)
    else:
        gather(None)  # raises _Abort if the first one failed
        yield


class StopSignal:
    """A signal number that reaches all processes with the next message that they exchange, so that
    they stop at the same step. 0 is none."""

    def __init__(self) -> None:
        self._own = self._agreed = 0

    def set(self, number: int) -> None:
        """Called in a signal handler."""
        self._own = number

    def clear(self) -> None:
        self._own = self._agreed = 0

    @property
    def own(self) -> int:
        """The signal that this process got itself."""
        return self._own

    @property
    def agreed(self) -> int:
        """The same in all processes; in a single one, its own."""
        return self._agreed if rank_and_world_size()[1] > 1 else self._own

    def update(self, numbers: Iterable[int]) -> None:
        """Take over the numbers of all processes."""
        self._agreed = max(self._agreed, *numbers)


stop_signal = StopSignal()


def any_wants_to_stop(wanted: bool) -> bool:
    """Whether this process wants to stop, or another one has wanted to."""
    if rank_and_world_size()[1] == 1:
        return wanted
    if wanted:
        set_in_store(_STOPPING)
    return wanted or is_in_store(_STOPPING)


def check_peers() -> None:
    """Raise PeerFailed if another process has failed."""
    if rank_and_world_size()[1] > 1 and is_in_store(_FAILED):
        raise PeerFailed


@contextmanager
def process_group() -> Iterator[None]:
    """Run a command's body in all processes; if one fails, all of them exit.

    The first process that failed raises its error, the others exit silently with the same code.
    With one process, this has no effect.
    """
    if not is_launched():
        yield
        return
    try:
        try:
            init_process_group()
            yield
            gather(None)
        except PeerFailed:
            gather(None)  # raises _Abort with the exit code of the process that failed
        except (_Abort, ConnectionLost):
            raise
        except Exception as error:
            _report(error)
            raise
    except ConnectionLost as error:
        is_first = _is_first_to_tell()
        abort_nccl()
        if not is_first:
            raise SystemExit(error.exit_code) from None
        raise
    except _Abort as abort:
        raise SystemExit(abort.exit_code) from None
    finally:
        if _Reported.others_wait:
            abort_nccl()
        _Reported.yet = _Reported.others_wait = False
        destroy_process_group()


@contextmanager
def failures_reported() -> Iterator[None]:
    """Report an error to the other processes where the block ends, rather than at the end of the
    command, and raise ConnectionLost if it is only a consequence of one that was killed."""
    try:
        yield
    except (PeerFailed, _Abort, ConnectionLost):
        raise
    except Exception as error:
        if has_group():
            _report(error)
        raise


@contextmanager
def collective_pass(needs_all: bool) -> Iterator[None]:
    """A pass of the model. If it ``needs_all`` processes, each waits in it for the others: they get
    no message if this one fails, and end when it exits. If several fail, only the first one raises
    its error."""
    try:
        yield
    except Exception as error:
        if not needs_all or not has_group() or not _is_own(error):
            raise
        _Reported.yet = _Reported.others_wait = True
        set_in_store(_FAILED)
        if not _is_first_to_tell():
            raise _Abort(rank_and_world_size()[0], _exit_code(error)) from None
        raise


def _is_own(error: Exception) -> bool:
    """Whether the error is neither another process's nor that of a lost connection."""
    if isinstance(error, (PeerFailed, _Abort, ConnectionLost)):
        return False
    import torch

    own = torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
    return isinstance(error, own) or not isinstance(error, RuntimeError)


class _Reported:
    """Whether this process has told the others of a failure, which they expect once, and whether
    it could not, since they wait for it in a pass."""

    yet = False
    others_wait = False


def _report(error: Exception) -> None:
    """Return in the one process that has to raise ``error``; raise _Abort in the others."""
    if _Reported.yet:
        return
    if not has_group():  # creating the group failed, presumably in all processes
        if not is_main():
            raise _Abort(0, _exit_code(error))
        return
    _Reported.yet = True
    try:
        set_in_store(_FAILED)
        _exchange(None, _exit_code(error))
    except _Abort as abort:
        if abort.rank != rank_and_world_size()[0]:
            raise
    except ConnectionLost:
        if isinstance(error, RuntimeError):  # a sum of tensors, or a pass that needs all processes
            raise


def _is_first_to_tell() -> bool:
    """Whether this process is the first to have lost the connection, as far as it can know: without
    torchrun, the store may have been in the process that is gone."""
    if not has_group() or launch_id() is None:
        return True
    try:
        return count_in_store(_LOST) == 1
    except ConnectionLost:
        return True


def _exit_code(error: Exception) -> int:
    return error.exit_code if isinstance(error, LorakitError) else 1


def _exchange(value: T, exit_code: int | None) -> list[T]:
    """Exchange a value, or a failure's exit code, and a signal; apart from tensor reductions, the
    only communication between hosts. A failing process sends this too, wherever it fails, so the
    others never hang. It does not wait for the device."""
    if (world_size := rank_and_world_size()[1]) == 1:
        return [value]
    import torch.distributed as dist

    messages: list[Any] = [None] * world_size
    try:
        message = value, exit_code, stop_signal.own
        dist.all_gather_object(messages, message, group=host_group())
    except RuntimeError as error:
        raise ConnectionLost from error
    stop_signal.update(number for _, _, number in messages)
    for rank, (_, code, _) in enumerate(messages):
        if code is not None:
            raise _Abort(rank, code)
    return [each for each, _, _ in messages]
