"""What processes tell each other while each of them does work of its own.

Work that processes do together ends for all of them when one fails, because the others wait for it.
Work of their own does not, so a thread of each process exchanges a message with the others every
second. If one of them fails, was killed or gets a signal, the others stop as after a signal.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import torch.distributed as dist

from lorakit.distributed.group import ConnectionLost, count_in_store
from lorakit.distributed.processes import PeerFailed, stop_signal
from lorakit.errors import Interrupted

_SECONDS_PER_MESSAGE = 1.0
_SECONDS_PER_LOOK = 0.2
#: Numbers the blocks, which all processes enter in the same order.
_blocks = count()


class Watch:
    """The other processes during the block of ``watch_peers``."""

    def __init__(self) -> None:
        self._block = next(_blocks)
        self._group = dist.new_group(backend="gloo")
        self._unsent: deque[Any] = deque()
        self._received: deque[Any] = deque()
        self._has_left, self._has_failed = threading.Event(), False
        self._is_lost = self._peer_failed = False
        self._thread = threading.Thread(target=self._talk, name="lorakit-watch", daemon=True)
        self._thread.start()

    def tell(self, event: object) -> None:
        """Send ``event``, which can be pickled, to the other processes with the next message."""
        self._unsent.append(event)

    def heard(self) -> Iterator[Any]:
        """The events that the others have sent since the last call, in the order of each sender."""
        while self._received:
            yield self._received.popleft()

    def claimed(self, total: int) -> Iterator[int]:
        """The numbers below ``total`` that are this process's: each is taken by the first that asks
        for one. Raises as ``check`` between two of them."""
        while True:
            self.check()
            number = count_in_store(f"lorakit/claimed/{self._block}") - 1
            if number >= total:
                return
            yield number

    def check(self) -> None:
        """Raise ConnectionLost if another process was killed, PeerFailed if it has failed, and
        Interrupted if any process has received a signal."""
        if self._is_lost:
            raise ConnectionLost
        if self._peer_failed:
            raise PeerFailed
        if stop_signal.own:
            raise Interrupted("interrupted", stop_signal.own)

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Wait until the others are done, too; raises as ``check``."""
        self._leave(failed=False, meanwhile=meanwhile)
        self.check()

    def stop(self, error: BaseException) -> None:
        """Tell the others that ``error`` ends the work of this process, and wait until they stop;
        raise what made them or this process stop, if it is not ``error`` itself."""
        self._leave(failed=not isinstance(error, Interrupted), meanwhile=lambda: None)
        if isinstance(error, Interrupted):
            with suppress(Interrupted):
                self.check()

    def _leave(self, failed: bool, meanwhile: Callable[[], None]) -> None:
        self._has_failed = failed
        self._has_left.set()
        while self._thread.is_alive():
            self._thread.join(_SECONDS_PER_LOOK)
            meanwhile()

    def _talk(self) -> None:
        has_left = False
        while not has_left:
            self._has_left.wait(_SECONDS_PER_MESSAGE)
            try:
                has_left = self._exchange()
            except Exception:  # a RuntimeError if the other end of a connection is closed
                self._is_lost = has_left = True
                stop_signal.set(signal.SIGTERM)
                with suppress(RuntimeError, ValueError):  # so that those that wait here notice, too
                    dist.destroy_process_group(self._group)

    def _exchange(self) -> bool:
        """Send a message and take those of the others; return whether all have left."""
        has_left = self._has_left.is_set()  # before the events, so that the last one is sent, too
        events = [self._unsent.popleft() for _ in range(len(self._unsent))]
        message = stop_signal.own, has_left, self._has_failed and has_left, events
        messages: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, message, group=self._group)
        others = messages[: dist.get_rank()] + messages[dist.get_rank() + 1 :]
        for _, _, _, sent in others:
            self._received.extend(sent)
        if any(failed for _, _, failed, _ in others):
            self._peer_failed = True
            stop_signal.set(signal.SIGTERM)
        elif not stop_signal.own and (number := max(number for number, *_ in others)):
            stop_signal.set(number)
        return all(left for _, left, _, _ in messages)


@contextmanager
def watch_peers() -> Iterator[Watch]:
    """Yield a ``Watch`` over the launcher's other processes, which enter the same block. An error
    in it ends the block in all processes; ``Watch.wait`` belongs at its end."""
    watch = Watch()
    try:
        yield watch
    except BaseException as error:
        watch.stop(error)
        raise
