"""Replay forward and backward passes as CUDA graphs, one per batch shape.

A small model's kernels take less time than their launches from Python. A graph launches all kernels
of a pass at once. The method's hooks, clipping and the optimizer run as in ``eager``: few launches,
during which the device still computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorakit.data.collate import Batch
from lorakit.layers import AdapterLayer
from lorakit.training.engine.capture import capturing, generator_of, restore_generator
from lorakit.training.engine.eager import EagerEngine
from lorakit.training.engine.staging import StagedFactors, counted_calls
from lorakit.training.random_states import random_states, restore_random_states

#: The tensors of a batch: name -> shape.
Shapes = tuple[tuple[str, torch.Size], ...]


@dataclass(frozen=True)
class _CapturedPass:
    """A forward and backward pass that reads ``inputs`` and ``factor`` and writes ``loss``."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    factor: Tensor
    loss: Tensor

    def replay(self, batch: Batch, factor: float | Tensor) -> Tensor:
        for name, tensor in batch.tensors().items():
            self.inputs[name].copy_(tensor)
        self.factor.fill_(factor)
        self.graph.replay()
        return self.loss.clone()


@dataclass(kw_only=True)
class CudaGraphEngine(EagerEngine):
    """Computes what ``EagerEngine`` does, on the same kernels.

    A pass is captured when its batch shape first occurs; batches should be padded to few shapes.
    Batches of other than ``rows`` rows (an epoch's last) run eagerly; with None, those of other
    than the first. If a pass cannot be captured, ``say`` gets the reason, and the run continues
    eagerly. ``layers`` are the adapter's, ``dtype`` is the model's precision. Layers that are
    ``compiled`` cast their factors themselves. With ``if_room``, a pass is captured only if there
    is as much memory for an eager one beside it, such as an evaluation's.
    """

    keeps_gradients: ClassVar[bool] = True

    say: Callable[[str], None]
    layers: Sequence[AdapterLayer]
    dtype: torch.dtype
    rows: int | None
    compiled: bool = False
    if_room: bool = False
    _is_warm: bool = field(default=False, init=False)
    _called_once: Sequence[AdapterLayer] = field(default=(), init=False)
    _staged: StagedFactors | None = field(default=None, init=False)
    _passes: dict[Shapes, _CapturedPass] = field(default_factory=dict, init=False)
    _enabled: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        # All graphs share their memory, since only one runs at a time.
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def captured_shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """The shapes of the batches whose passes have been captured."""
        return [{name: tuple(shape) for name, shape in shapes} for shapes in self._passes]

    def _forward_backward(self, batch: Batch, factor: float | Tensor) -> Tensor:
        if not self._is_warm:
            self._warm_up(batch)
        if self._staged is None and not self.compiled and self.dtype != torch.float32:
            self._staged = StagedFactors(self._called_once, self.dtype)
        captured = self._captured(batch)
        if captured is None:
            return self._pass(batch, factor)
        return captured.replay(batch, factor)

    def _warm_up(self, batch: Batch) -> None:
        """Initialize libraries and allocate the gradients, by a pass whose results are discarded:
        the first step after a resume, too, is then a replay, as in a run that was not interrupted.
        """
        states = random_states()
        layers = () if self.compiled else self.layers  # compiled code would see the hooks
        with counted_calls(layers) as calls:
            super()._forward_backward(batch, 1.0)
        self._called_once = [x for x, count in zip(layers, calls, strict=True) if count == 1]
        restore_random_states([states])
        self.discard_gradients()
        self._is_warm = True
        if self.if_room and not _has_room_for_two_passes(batch.input_ids.device):
            self._enabled = False
            self.say("CUDA graphs are disabled: no memory is left for a second training pass")

    def _pass(self, batch: Batch, factor: float | Tensor) -> Tensor:
        if self._staged is None:
            return super()._forward_backward(batch, factor)
        with self._staged.training():
            return super()._forward_backward(batch, factor)

    def _captured(self, batch: Batch) -> _CapturedPass | None:
        if self.rows is None:
            self.rows = len(batch.input_ids)
        if not self._enabled or len(batch.input_ids) != self.rows:
            return None
        shapes = tuple((name, tensor.shape) for name, tensor in batch.tensors().items())
        if shapes not in self._passes:
            device = batch.input_ids.device
            random_state = generator_of(device).get_state()
            try:
                self._passes[shapes] = self._capture(batch)
            except RuntimeError as error:
                self._disable(error, device, random_state)
                return None
        return self._passes[shapes]

    def _capture(self, batch: Batch) -> _CapturedPass:
        inputs = {name: tensor.clone() for name, tensor in batch.tensors().items()}
        static: Batch = replace(batch, **inputs)
        factor = torch.ones((), device=batch.input_ids.device)
        missing = [p for p in self.parameters.values() if p.grad is None]
        # Staged factors have gradients of their own.
        apart = [] if self._staged else [p for p in self.parameters.values() if p.grad is not None]
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, self._pool), _added_at_once(apart):
                loss = self._pass(static, factor)
            if any(p.grad is not None for p in missing):
                raise RuntimeError("parameters get gradients from some batches only")
        except RuntimeError:
            for parameter in missing:
                parameter.grad = None  # its memory belongs to the graph
            raise
        return _CapturedPass(graph, inputs, factor, loss)

    def _disable(self, error: RuntimeError, device: torch.device, random_state: Tensor) -> None:
        self._enabled = False
        self._passes.clear()
        restore_generator(device, random_state)
        [reason, *_] = str(error).splitlines() or [type(error).__name__]
        self.say(f"CUDA graphs are disabled: a training pass could not be captured: {reason}")


@contextmanager
def _added_at_once(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Add the gradients that the block computes in a few kernels, instead of one for each."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
        pairs = zip(before, parameters, strict=True)
        found = [(grad, p.grad) for grad, p in pairs if grad is not None and p.grad is not None]
        if found:
            sums, terms = zip(*found, strict=True)
            torch._foreach_add_(sums, terms)
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad


def _has_room_for_two_passes(device: torch.device) -> bool:
    """Whether the device has twice the memory that a pass has just needed."""
    now = torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - now
    return free >= 2 * (torch.cuda.max_memory_allocated(device) - now)
