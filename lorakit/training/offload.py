"""Recompute each layer in the backward pass from its input, which waits in host memory.

The inputs are copied on a stream of their own while the next layers compute, and back while the
layer above runs its backward pass, so that the device holds few of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lorakit.anatomy import transformer_layers
from lorakit.errors import UserError
from lorakit.recipe.sections import TrainSection


class LayerStore(Protocol):
    """Where the inputs of layers wait for the backward pass.

    ``hooks`` replaces what a checkpoint saves. ``anchor`` makes the output of a checkpoint require
    a gradient even if its input, the frozen embeddings, does not. ``start_pass`` is called by the
    first layer."""

    anchor: Tensor
    hooks: saved_tensors_hooks

    def start_pass(self) -> None: ...


def offload_layers(
    model: nn.Module,
    device: torch.device,
    compiled: bool,
    backend: Any = "inductor",
    store: LayerStore | None = None,
) -> None:
    """Make each layer of ``model``, on ``device``, keep only its input, in ``store`` (host memory),
    until its backward pass. ``compiled`` compiles what a layer computes, by ``backend``. Raises
    UserError for a model without a stack of layers."""
    layers = transformer_layers(model)
    if not layers:
        raise UserError(
            f'train.gradient_checkpointing = "offload": {type(model).__name__} has no stack of '
            "layers; allowed: true, false"
        )
    store = store or _HostStore(device)
    for index, layer in enumerate(layers):
        forward = torch.compile(layer.forward, backend=backend) if compiled else layer.forward
        layer.forward = _Offloaded(layer, forward, store, first=index == 0)


def check_offload(section: TrainSection) -> None:
    """Raise UserError if the recipe wants to offload and there is no GPU."""
    if section.gradient_checkpointing == "offload" and not torch.cuda.is_available():
        raise UserError(
            'train.gradient_checkpointing = "offload": needs a GPU; allowed here: true, false'
        )


class _Offloaded:
    """The ``forward`` of a layer that runs ``forward`` twice in training, the second time in the
    backward pass."""

    def __init__(
        self, layer: nn.Module, forward: Callable[..., Any], store: LayerStore, first: bool
    ) -> None:
        self._layer, self._forward, self._store, self._first = layer, forward, store, first

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
            self._store.start_pass()
        with self._store.hooks:
            return checkpoint(run, hidden_states, self._store.anchor, use_reentrant=True)


@dataclass
class _Saved:
    """A layer's input in host memory; ``previous`` is that of the layer before, which the backward
    pass takes next. ``fetched`` is its copy on the device, complete after ``ready``."""

    host: Tensor
    previous: _Saved | None
    fetched: Tensor | None = None
    ready: torch.cuda.Event | None = None


class _HostStore:
    """Copies what a checkpoint saves to host memory and back. On the CPU it keeps copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.hooks = saved_tensors_hooks(self._put, self._take)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: _Saved | None = None

    def start_pass(self) -> None:
        self._last = None

    def _put(self, x: Tensor) -> _Saved | Tensor:
        if x.dim() == 0:  # the anchor
            return x
        if self._stream is None:
            host = x.clone()
        else:
            # PyTorch reuses pinned memory, once the copies from it are complete.
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                host.copy_(x, non_blocking=True)
            x.record_stream(self._stream)
        self._last = _Saved(host, self._last)
        return self._last

    def _take(self, saved: _Saved | Tensor) -> Tensor:
        """The tensor, on the device; the copy of the one before it begins."""
        if isinstance(saved, Tensor):
            return saved
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
