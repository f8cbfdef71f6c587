"""Follow the memory and operations of passes on the ``meta`` device, which computes shapes only.

Every operator's new tensors count from when they are made until nothing refers to them, as on a
GPU. Sizes are rounded up like those of PyTorch's CUDA allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

#: Sizes of blocks are multiples of this.
_BLOCK_BYTES = 512
#: Arguments of an operator -> the bytes that it allocates for itself while it runs.
Temporary = Callable[..., int]
#: Arguments and the result of an operator -> its floating-point operations.
Flops = Callable[..., int]


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it, by ``part``, and the ``flops``.

    ``temporaries`` and ``flops`` are by the name of an operator. ``at_peak`` are the bytes by part
    when most were in use.
    """

    def __init__(
        self,
        temporaries: Mapping[str, Temporary],
        flops: Mapping[str, Flops],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "workspace"
        self.bytes_of: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self.peak_bytes = self.marked_peak_bytes = self.flops = 0
        self.kernels = self.written_bytes = 0
        self._live: dict[int, tuple[str, int]] = {}
        self._known: dict[int, Any] = {}
        self.temporaries, self._flops = dict(temporaries), dict(flops)
        self._paused = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let ``torch.compile`` work within the mode, and do not count what it does to compile."""
        return True

    @property
    def bytes_in_use(self) -> int:
        return sum(self.bytes_of.values())

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """Do not count ``tensors``, which exist already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage

    def forget_peak(self) -> None:
        """Start anew with what is in use."""
        self.peak_bytes = 0
        self.flops = self.kernels = self.written_bytes = 0
        self.use(0)

    def mark(self) -> None:
        """Let ``marked_peak_bytes`` be the peak from now on."""
        self.marked_peak_bytes = self.bytes_in_use

    @contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """Count what the block makes as ``part``."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count the operations of the block, but not its tensors."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def count(self, value: Any) -> None:
        """Count the tensors in ``value`` from now on."""
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._count(tensor)

    def move(self, tensor: Tensor, part: str) -> None:
        """Count ``tensor`` as ``part`` from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._live:
            before, size = self._live[key]
            self.bytes_of[before] -= size
            self.bytes_of[part] = self.bytes_of.get(part, 0) + size
            self._live[key] = part, size

    def use(self, size: int) -> None:
        """Note that ``size`` bytes more than what is counted are in use for a moment."""
        total = self.bytes_in_use + size
        self.marked_peak_bytes = max(self.marked_peak_bytes, total)
        if total > self.peak_bytes:
            self.peak_bytes = total
            self.at_peak = dict(self.bytes_of)
            self.at_peak[self.part] = self.at_peak.get(self.part, 0) + size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        name = str(packet)
        flops = self._flops.get(name) or flop_registry.get(packet)
        if flops is not None:
            self.flops += flops(*args, **kwargs, out_val=out)
        if not self._paused:
            if (temporary := self.temporaries.get(name)) is not None:
                self.use(temporary(*args, **kwargs))
            self.count(out)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._known:
            return
        size = -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
        self._live[key] = self.part, size
        self.bytes_of[self.part] = self.bytes_of.get(self.part, 0) + size
        weakref.finalize(storage, self._release, key)
        self.kernels += 1
        self.written_bytes += size
        self.use(0)

    def _release(self, key: int) -> None:
        if key in self._live:
            part, size = self._live.pop(key)
            self.bytes_of[part] -= size


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages of ``tensors``, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(-(-s.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES for s in storages.values())
