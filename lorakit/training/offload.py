"""Recompute each layer in the backward pass from its input, which waits in host memory.

The inputs are copied on a stream of their own while the next layers compute, and back while the
layer above runs its backward pass, so that the device holds few of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lorakit.anatomy import transformer_layers
from lorakit.errors import UserError
from lorakit.notes import Say, silent
from lorakit.recipe.sections import TrainSection
from lorakit.training.fast_layers import compile_checkpoints, compile_last_norm


class LayerStore(Protocol):
    """Where the inputs of layers wait for the backward pass: ``put`` returns an object other than a
    tensor, for which ``take`` returns the input. ``start_pass`` is called by the first layer."""

    def start_pass(self) -> None: ...

    def put(self, x: Tensor) -> Any: ...

    def take(self, saved: Any) -> Tensor: ...


def offload_layers(
    model: nn.Module,
    device: torch.device,
    compiled: bool,
    backend: Any = "inductor",
    store: LayerStore | None = None,
    say: Say = silent,
) -> None:
    """Make each layer of ``model``, on ``device``, keep only its input, in ``store`` (host memory),
    until its backward pass. ``compiled`` compiles what a layer computes, by ``backend``; ``say``
    gets a note about layers that are not compiled as a single graph. Raises UserError for a model
    without a stack of layers."""
    layers = transformer_layers(model)
    if not layers:
        raise UserError(
            f'train.gradient_checkpointing = "offload": {type(model).__name__} has no stack of '
            "layers; allowed: true, false"
        )
    inputs = _Inputs(store or _HostStore(device), next(model.parameters()).device)
    say = cache(say)  # once for all layers
    recompute = None
    if compiled:
        compile_checkpoints()
        compile_last_norm(model, backend)
        recompute = torch.compile(_recomputed, backend=backend, fullgraph=True)
    for index, layer in enumerate(layers):
        plain = layer.forward
        forward = torch.compile(plain, backend=backend) if compiled else plain
        offloaded = _Offloaded(layer, forward, inputs, say, first=index == 0)
        if recompute is not None:
            offloaded.recomputed = partial(recompute, plain)
        layer.forward = offloaded


def check_offload(section: TrainSection) -> None:
    """Raise UserError if the recipe wants to offload and there is no GPU."""
    if section.gradient_checkpointing == "offload" and not torch.cuda.is_available():
        raise UserError(
            'train.gradient_checkpointing = "offload": needs a GPU; allowed here: true, false'
        )


class _Offloaded:
    """The ``forward`` of a layer that runs ``forward`` twice in training, the second time in the
    backward pass. ``recomputed``, if it can be compiled, computes in the backward pass only what
    that reads: the last product of a layer is left out."""

    recomputed: Callable[..., Any] | None = None

    def __init__(
        self,
        layer: nn.Module,
        forward: Callable[..., Any],
        inputs: _Inputs,
        say: Say,
        first: bool,
    ) -> None:
        self._layer, self._forward, self._inputs, self._first = layer, forward, inputs, first
        self._say = say

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (self._layer.training and torch.is_grad_enabled()):
            return self._forward(hidden_states, *args, **kwargs)
        others = [*args, *kwargs.values()]
        if any(isinstance(value, Tensor) and value.requires_grad for value in others):
            raise UserError(
                f'train.gradient_checkpointing = "offload": {type(self._layer).__name__} gets '
                "more than one trained input; allowed: true, false"
            )

        def run(x: Tensor, _anchor: Tensor) -> Any:
            return self._forward(x, *args, **kwargs)

        if self._first:
            self._inputs.store.start_pass()
        with self._inputs.keeping(hidden_states):
            if self.recomputed is not None:
                exc = torch._dynamo.exc
                try:
                    return self.recomputed(hidden_states, *args, **kwargs)
                except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit):
                    self.recomputed = None  # no single graph, or too many input shapes
                    self._say(
                        f"{type(self._layer).__name__} cannot be compiled as a single graph, or "
                        "has too many input shapes: the backward pass recomputes the whole layer"
                    )
            return checkpoint(run, hidden_states, self._inputs.anchor, use_reentrant=True)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a layer's ``forward``; compiled, its backward pass computes it again."""
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


class _Inputs:
    """Puts the inputs of layers into ``store``, and leaves what else is saved where it is.

    ``anchor`` makes the output of a checkpoint require a gradient even if its input, the frozen
    embeddings, does not."""

    def __init__(self, store: LayerStore, device: torch.device) -> None:
        self.store = store
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._input: Tensor | None = None

    @contextmanager
    def keeping(self, x: Tensor) -> Iterator[None]:
        """Store ``x``, the input of the layer that the block runs, if it is saved."""
        self._input = x
        try:
            with self._hooks:
                yield
        finally:
            self._input = None

    def _pack(self, tensor: Tensor) -> Any:
        return self.store.put(tensor) if tensor is self._input else tensor

    def _unpack(self, saved: Any) -> Tensor:
        return saved if isinstance(saved, Tensor) else self.store.take(saved)


@dataclass
class _Saved:
    """A layer's input in host memory; ``previous`` is that of the layer before, which the backward
    pass takes next. ``fetched`` is its copy on the device, complete after ``ready``."""

    host: Tensor
    previous: _Saved | None
    fetched: Tensor | None = None
    ready: torch.cuda.Event | None = None


class _HostStore:
    """Copies inputs to host memory and back. On the CPU it keeps copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: _Saved | None = None

    def start_pass(self) -> None:
        self._last = None

    def put(self, x: Tensor) -> _Saved:
        if self._stream is None:
            host = x.clone()
        else:
            # PyTorch reuses pinned memory, once the copies from it are complete.
            host = torch.empty_like(x, device="cpu", pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                host.copy_(x, non_blocking=True)
            x.record_stream(self._stream)
        self._last = _Saved(host, self._last)
        return self._last

    def take(self, saved: _Saved) -> Tensor:
        """The tensor, on the device; the copy of the one before it begins."""
        self._last = None
        self._fetch(saved)
        if saved.previous is not None:
            self._fetch(saved.previous)
            saved.previous = None
        x, saved.fetched = saved.fetched, None
        assert x is not None
        if saved.ready is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(saved.ready)
            x.record_stream(current)
        return x

    def _fetch(self, saved: _Saved) -> None:
        if saved.fetched is not None:
            return
        if self._stream is None:
            saved.fetched = saved.host
            return
        with torch.cuda.stream(self._stream):
            saved.fetched = saved.host.to(self._device, non_blocking=True)
            saved.ready = self._stream.record_event()
