"""This process's place in the launcher's process group, and the group's store.

``torchrun`` and ``accelerate launch`` start one command several times. Without a launcher there is
one process, and no group is created.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

from lorakit.distributed.launcher import (
    check_fsdp_settings,
    check_variables,
    is_launched,
    own_store,
    uses_fsdp,
)
from lorakit.errors import LorakitError, UserError

#: For a process that is alive. One that was killed is noticed at once, by its connections.
_LONGEST_WAIT = timedelta(hours=6)


class ConnectionLost(LorakitError):
    """Another process was killed, or its host cannot be reached; ``advice`` says what to do."""

    def __init__(self, advice: str = "") -> None:
        lost = "the connection to another process is lost (was it killed?)"
        super().__init__(f"{lost}; {advice}" if advice else lost)


class _Alone:
    """Whether this process acts as if it were the only one."""

    now = False


@contextmanager
def alone() -> Iterator[None]:
    """Let this process act as if it were the only one during the block, and exchange nothing with
    the others: for runs of its own, in which it prints and writes files."""
    before, _Alone.now = _Alone.now, True
    try:
        yield
    finally:
        _Alone.now = before


def is_main() -> bool:
    """Whether this process prints and writes files."""
    return _Alone.now or is_first()


def is_first() -> bool:
    """Whether this process is the launcher's first one, or the only one; also without a valid rank,
    which is an error to be printed."""
    if not is_launched():
        return True
    rank, world_size = os.environ.get("RANK", "0"), os.environ["WORLD_SIZE"]
    is_other = rank.isdecimal() and world_size.isdecimal() and 0 < int(rank) < int(world_size)
    return not is_other


def processes_on_host() -> int:
    """How many processes the launcher has started on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if is_launched() else 1


def rank_and_world_size() -> tuple[int, int]:
    if not has_group():
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


def init_process_group() -> None:
    """Join the launcher's other processes, if there are any, and select this process's device.

    Raises UserError if there are more processes than devices, for variables that are not those of a
    launcher, or for settings of FSDP that are not supported.
    """
    if not is_launched():
        return
    check_variables()
    if uses_fsdp():
        check_fsdp_settings()
    import torch
    from accelerate import PartialState

    from lorakit.models.load import default_device

    on_cuda = default_device().type == "cuda"
    local = processes_on_host()
    if on_cuda and local > torch.cuda.device_count():
        raise UserError(
            f"launched as {local} processes on a machine with {torch.cuda.device_count()} GPUs; "
            "allowed: at most one process per GPU"
        )
    with _ended_by_signals():
        try:
            PartialState(cpu=not on_cuda, **own_store())
        except RuntimeError as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise LorakitError(
                f"MASTER_ADDR:MASTER_PORT = {address}: the processes cannot connect: "
                f"{str(error).splitlines()[0]}"
            ) from error
        host_group()  # later, a process that is gone could not join


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the process during the block, in which it waits for the others
    outside of Python, where no handler runs. Nothing has been written yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def has_group() -> bool:
    if _Alone.now or not is_launched():
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


@cache
def host_group() -> Any:
    """A group whose messages go through the host. It waits for a process that is alive: reading and
    tokenizing data, or a checkpoint of a large model, may take longer than torch's 30 minutes."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)


def set_in_store(key: str) -> None:
    try:
        default_store().set(key, "1")
    except RuntimeError as error:  # the process that had the store is gone
        raise ConnectionLost from error


def is_in_store(key: str) -> bool:
    try:
        return bool(default_store().check([key]))
    except RuntimeError as error:
        raise ConnectionLost from error


def count_in_store(key: str) -> int:
    """How many calls there have been with ``key``, over all processes."""
    try:
        return int(default_store().add(key, 1))
    except RuntimeError as error:
        raise ConnectionLost from error


def default_store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def abort_nccl() -> None:
    """Give up NCCL's groups. Destroying them would wait for the process that is gone."""
    import torch.distributed as dist

    if has_group() and "nccl" in dist.get_backend():
        dist.distributed_c10d._abort_process_group()


def destroy_process_group() -> None:
    if has_group():
        from accelerate import PartialState

        host_group.cache_clear()
        PartialState().destroy_process_group()
