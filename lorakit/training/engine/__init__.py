"""Engines: one optimizer step, from micro-batches to updated weights.

An engine does everything between a batch and the updated weights: forward and backward passes,
accumulation, clipping, the optimizer and its schedule, float16's loss scaling, and the method's
hooks. It never waits for the device in a step. The loop decides when to step, log, evaluate, save
and stop, and uses an engine only through the ``Engine`` protocol.

To add an engine, implement ``Engine`` in a new module, add its mode to
``training.execution.choose_execution`` and its class to ``training.build.build_engine``. Its
losses, gradient norms and weights must equal those of ``eager``, the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lorakit.data.collate import Batch


@dataclass(frozen=True)
class StepResult:
    """The scalars of one optimizer step, on the device: reading one waits for the step.

    ``loss`` is the mean over the step's trained tokens (an encoder's rows) with the weights from
    before the update, ``grad_norm`` the norm of the whole gradient before clipping, ``values`` are
    the method's, in the order of ``Engine.value_names``. ``loss_count`` is the divisor of the mean
    over all processes, the number of losses or the sum of their weights; the host knows it in
    advance.
    """

    loss: Tensor
    grad_norm: Tensor
    values: tuple[Tensor, ...]
    loss_count: float


@dataclass
class EngineState:
    """Everything that an engine needs to continue exactly; its tensors may still be in use.

    ``step`` counts finished optimizer steps, ``weights`` are the trained parameters by name,
    ``method`` is the state of the method's hooks; ``scaler`` is None without loss scaling.
    """

    step: int
    weights: dict[str, Tensor]
    method: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None


class Engine(Protocol):
    """What the loop requires of an engine."""

    @property
    def value_names(self) -> tuple[str, ...]:
        """The names that ``StepResult.values`` have in ``metrics.jsonl``."""

    @property
    def scales_loss(self) -> bool:
        """Whether float16's loss scaler skips steps whose gradient is not finite."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The trained parameters by name, as they are now."""

    def step(self, micro_batches: Sequence[Batch], loss_count: float | None = None) -> StepResult:
        """Take one optimizer step on batches that are on the device: this process's, possibly none,
        of a step whose losses over all processes count ``loss_count``. The default is that of one
        process."""

    def loss(self, micro_batches: Sequence[Batch]) -> float:
        """The mean loss over all processes, without dropout and gradients; waits for the device."""

    def log_values(self) -> dict[str, float]:
        """The last step's values that the host has: ``learning_rate``, and the method's."""

    def changed_ranks(self, steps: int) -> Tensor | None:
        """The ranks on the device, if the last ``steps`` steps have chosen them."""

    def is_final_form(self) -> bool:
        """Whether the method has reached its final form, so that the weights may be the result."""

    def ranks(self) -> dict[str, int] | None:
        """Each adapted matrix's rank, if the method chose it during training."""

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the values of the trained parameters."""

    def state_dict(self) -> EngineState: ...

    def load_state_dict(self, state: EngineState) -> None:
        """Raises ValueError, with nothing changed, if ``state`` is of another model or method."""


def same_shapes(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names, with tensors of the same shapes and types."""
    return _shapes(one) == _shapes(other)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
