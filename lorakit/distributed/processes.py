"""Several processes, one evaluation: who does which rows, and how all hear of all.

``torchrun`` and ``accelerate launch`` start the same command several times. Each process loads the
model on its own device (``cuda:LOCAL_RANK``) and takes every n-th row; ``gather`` brings the
results together. Without a launcher all of this is one process, and no group is made.

A process that fails says so in the group's store, which the others read between batches, and in
the next exchange; so none waits for one that is gone, and one of them tells the user."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from lorakit.errors import LorakitError, UserError

T = TypeVar("T")
_FAILED = "lorakit/failed"


class PeerFailed(Exception):
    """Another process failed, and this one has heard of it between two batches."""


class _Ending(Exception):
    """Some process failed, and all know: ``process`` is the first of them."""

    def __init__(self, process: int, exit_code: int) -> None:
        self.process, self.exit_code = process, exit_code


def launched() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def is_main() -> bool:
    """Whether this process is the one that prints and writes files."""
    return not launched() or os.environ.get("RANK", "0") == "0"


def start() -> None:
    """Join the launcher's other processes, if there are any, and take a device of one's own.

    Raises UserError if there are more processes than devices.
    """
    if not launched():
        return
    import torch
    from accelerate import PartialState

    from lorakit.models.load import default_device

    on_cuda = default_device().type == "cuda"
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if on_cuda and local > torch.cuda.device_count():
        raise UserError(
            f"launched as {local} processes on a machine with {torch.cuda.device_count()} GPUs; "
            "allowed: at most one process a GPU"
        )
    PartialState(cpu=not on_cuda)


def own_rows(total: int) -> range:
    """The rows that this process does: each row falls to one process, also where they do not
    divide or are fewer than the processes."""
    process, count = _place()
    return range(process, total, count)


def in_order(shares: Sequence[Sequence[T]]) -> list[T]:
    """The processes' shares of ``own_rows`` -> all rows, none twice and none lost."""
    total, count = sum(map(len, shares)), len(shares)
    rows: list[Any] = [None] * total
    for process, share in enumerate(shares):
        rows[process::count] = share  # refused by Python where the lengths differ
    return rows


def gather(value: T) -> list[T]:
    """Every process's ``value``, in the processes' order, on each of them."""
    return _exchange(value, None)


def on_main(work: Callable[[], T]) -> T:
    """What ``work`` gives in the main process, on each of them."""
    return gather(work() if _place()[0] == 0 else None)[0]  # type: ignore[return-value]


def check_peers() -> None:
    """Raise PeerFailed if another process has failed."""
    if _place()[1] > 1 and _store().check([_FAILED]):
        raise PeerFailed


@contextmanager
def together() -> Iterator[None]:
    """Run a command's body in all processes; if it fails in any, it ends in all.

    The first process that failed raises its error, the others end with the same exit code and
    without a word. With one process, the body runs as it is.
    """
    if not launched():
        yield
        return
    try:
        try:
            start()
            yield
            gather(None)
        except PeerFailed:
            gather(None)  # of which another one's failure comes
        except _Ending:
            raise
        except Exception as error:
            _tell_of(error)
            raise
    except _Ending as end:
        raise SystemExit(end.exit_code) from None
    finally:
        _leave()


def _tell_of(error: Exception) -> None:
    """Return in the one process that is to raise its error; raise _Ending in the others."""
    if not _grouped():  # no group was made, and the same will have happened to all
        if not is_main():
            raise _Ending(0, _exit_code(error))
        return
    _store().set(_FAILED, "1")
    try:
        _exchange(None, _exit_code(error))
    except _Ending as end:
        if end.process != _place()[0]:
            raise


def _exit_code(error: Exception) -> int:
    return error.exit_code if isinstance(error, LorakitError) else 1


def _exchange(value: T, exit_code: int | None) -> list[T]:
    """The one thing that processes say to each other: what they have, or that they failed."""
    if (count := _place()[1]) == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * count
    dist.all_gather_object(found, (value, exit_code))
    for number, (_, code) in enumerate(found):
        if code is not None:
            raise _Ending(number, code)
    return [each for each, _ in found]


def _grouped() -> bool:
    if not launched():
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if not _grouped():
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _leave() -> None:
    if _grouped():
        from accelerate import PartialState

        PartialState().destroy_process_group()
