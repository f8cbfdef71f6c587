"""Compute one pass of a run on the ``meta`` device, to know its memory and operations in advance.

The modules, kernels and layouts are those of the run itself, so that an architecture or a method
needs no formula of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.data.collate import Batch
from lorakit.distributed.strategy import Strategy
from lorakit.kernels import linear_cross_entropy
from lorakit.layers import adapter_layers
from lorakit.models.host_masks import host_masks
from lorakit.models.master_weights import base_dtype
from lorakit.notes import silent
from lorakit.planning.attention import planned_attention
from lorakit.planning.compiled import planned_backend
from lorakit.planning.operators import FLOPS, TEMPORARIES
from lorakit.planning.tracker import MemoryTracker, storage_bytes
from lorakit.planning.unloaded import META
from lorakit.training.build import Objective, arrange_layers, wrap_model
from lorakit.training.engine.staging import StagedFactors
from lorakit.training.execution import Execution
from lorakit.training.setup import Prepared

#: Returns a batch, given whether packed rows become one sequence.
BatchOf = Callable[[bool], Batch]


@dataclass(frozen=True)
class PassCosts:
    """Bytes and operations of a forward and a backward pass.

    ``weights`` are those of the frozen base, ``trained`` the values of trained parameters and their
    copies. ``activations`` is what is kept when the loss is computed, and ``logits`` what the
    output layer and the loss add to it. ``peak`` does not contain weights and trained values, but
    the ``gradients`` that are there then. ``written`` are the bytes of all results, which
    ``kernels`` compute; ``tokens`` are those of the batch, with padding."""

    weights: int
    trained: int
    gradients: int
    activations: int
    logits: int
    peak: int
    flops: int
    kernels: int
    written: int
    tokens: int


class _PlannedStrategy(Strategy):
    """Chooses as on ``device``, but keeps the model on ``meta``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def device(self) -> torch.device:
        return self._device

    def place(self, model: nn.Module, checkpoints: bool = False) -> None:
        model.to(META)


def plan_pass(
    prepared: Prepared, device: torch.device, execution: Execution, largest: BatchOf
) -> PassCosts:
    """The costs of the run's passes on ``device``, of whose batches ``largest`` returns the largest
    one; the model of ``prepared``, on ``meta``, is changed."""
    torch._dynamo.reset()  # of what was compiled for another plan
    with _as_on(device):
        tracker = MemoryTracker(TEMPORARIES, FLOPS)
        objective = _arranged(prepared, device, execution, tracker)
        batch = largest(objective.varlen).to(META)
        return _Pass(prepared, objective, execution, tracker, batch).costs()


def _arranged(
    prepared: Prepared, device: torch.device, execution: Execution, tracker: MemoryTracker
) -> Objective:
    strategy = _PlannedStrategy(device)
    objective = wrap_model(prepared, strategy, silent)
    if device.type == "cpu":
        objective.kernels = "torch"
    if execution.mode == "compiled_layers":
        objective.model.train()
    arrange_layers(
        prepared, strategy, execution, silent, planned_backend(tracker), _PlannedStore(tracker)
    )
    return objective.train()


class _Pass:
    """A pass of ``batch``, after others if gradients are already there then."""

    def __init__(
        self,
        prepared: Prepared,
        objective: Objective,
        execution: Execution,
        tracker: MemoryTracker,
        batch: Batch,
    ) -> None:
        self._prepared, self._objective, self._batch = prepared, objective, batch
        self._graphs = execution.mode == "cuda_graphs"
        self._tracker = tracker
        tensors = [*objective.parameters(), *objective.buffers(), *batch.tensors().values()]
        self._trained = [p for p in objective.parameters() if p.requires_grad]
        trained = {id(p) for p in self._trained}
        self._frozen = [t for t in tensors if id(t) not in trained]
        tracker.exclude(tensors)
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(self._note_gradient)

    def costs(self) -> PassCosts:
        tracker = self._tracker
        accumulates = self._prepared.recipe.train.gradient_accumulation_steps > 1
        factors = None
        with tracker:
            if self._graphs or accumulates:
                self._forward_backward()
            if self._graphs and base_dtype(self._objective) != torch.float32:
                layers = adapter_layers(self._prepared.model).values()
                with tracker.counting_as("adapter"):
                    factors = StagedFactors(layers, base_dtype(self._objective))
            tracker.forget_peak()
            with factors.training() if factors else nullcontext():
                kept, logits = self._forward_backward()
        return PassCosts(
            weights=storage_bytes(self._frozen),
            trained=storage_bytes(self._trained) + tracker.bytes_of.get("adapter", 0),
            gradients=tracker.at_peak.get("gradients", 0),
            activations=kept,
            logits=logits,
            peak=tracker.peak_bytes,
            flops=tracker.flops,
            kernels=tracker.kernels,
            written=tracker.written_bytes,
            tokens=self._batch.input_ids.numel(),
        )

    def _forward_backward(self) -> tuple[int, int]:
        """What is kept of the forward pass, and what the loss needs at most."""
        tracker, batch = self._tracker, cast("Any", self._batch)
        before = tracker.bytes_in_use
        with tracker.counting_as("activations"):
            states = self._objective.states(batch)
        kept = tracker.bytes_in_use
        tracker.mark()
        with tracker.counting_as("logits"):
            loss = self._objective.losses(states, batch)
        del states
        logits = tracker.marked_peak_bytes - kept
        if loss.requires_grad:
            loss.backward()
        return kept - before, logits

    def _note_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._tracker.move(parameter.grad, "gradients")


class _PlannedStore:
    """Host memory for the inputs of layers, of which the device has that of the layer and, since
    it is copied ahead, the one before."""

    def __init__(self, tracker: MemoryTracker) -> None:
        self._ahead: Tensor | None = None

    def start_pass(self) -> None:
        self._ahead = None

    def put(self, x: Tensor) -> Any:
        return x.shape, x.dtype

    def take(self, saved: Any) -> Tensor:
        shape, dtype = saved
        found = self._ahead
        self._ahead = torch.empty(shape, dtype=dtype, device=META)
        return torch.empty(shape, dtype=dtype, device=META) if found is None else found


@contextmanager
def _as_on(device: torch.device) -> Iterator[None]:
    """Let tensors on ``meta`` be processed as on ``device``."""
    chunks = linear_cross_entropy.CHUNK_ELEMENTS
    before = chunks["meta"]
    chunks["meta"] = chunks.get(device.type, before)
    try:
        with host_masks(META), planned_attention(device.type):
            yield
    finally:
        chunks["meta"] = before
