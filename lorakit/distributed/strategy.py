"""Where a training runs: its device, its precision, and how gradients and counts are reduced."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from lorakit.distributed.processes import gather, is_launched
from lorakit.errors import UserError


class Strategy:
    """One process on one device (``single``).

    ``wrap`` may replace a module's parameters, so it must run before anything refers to them:
    parameter groups, hooks, the optimizer. After ``backward`` on the last micro-batch of a step,
    gradients are sums over all processes, and losses are divided by counts that ``total`` has
    summed over all processes. For a single process both are the values themselves.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """float16's loss scaler; None for other precisions."""
        scaler: torch.amp.GradScaler | None = self.accelerator.scaler
        return scaler

    @property
    def skipped_update(self) -> bool:
        """Whether the scaler skipped the last optimizer step because a gradient was not finite."""
        skipped: bool = self.accelerator.optimizer_step_was_skipped
        return skipped

    def wrap(self, module: nn.Module) -> Any:
        """Return ``module`` on its device, in the run's precision and ready for ``backward``."""
        return self.accelerator.prepare_model(module)

    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> AcceleratedOptimizer:
        """Return ``optimizer`` with float16's loss scaling, if the run uses it."""
        return self.accelerator.prepare_optimizer(optimizer)

    def accumulate(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Return the context for one micro-batch; only the ``last`` one reduces gradients."""
        return nullcontext() if last else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def scale(self, gradient: Tensor) -> Tensor:
        """Scale ``gradient`` like those of ``backward``, which ``clip_grad_norm`` undoes."""
        scaled: Tensor = gradient if self.scaler is None else self.scaler.scale(gradient)
        return scaled

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Undo the loss scaling, clip to ``max_norm`` and return the norm before clipping."""
        norm: Tensor = self.accelerator.clip_grad_norm_(list(parameters), max_norm)
        return norm

    def total(self, count: int) -> int:
        """The sum of ``count`` over all processes."""
        return sum(gather(count))

    def reduce(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over all processes, on the device."""
        reduced: Tensor = self.accelerator.reduce(value, reduction="sum")
        return reduced


def build_strategy(dtype: str) -> Strategy:
    """Return the strategy for a model in precision ``dtype``: ``single``, the only one so far.

    Raises UserError if a launcher started several processes, or for float16 on the CPU.
    """
    if is_launched():
        raise UserError(
            f"launched as {os.environ['WORLD_SIZE']} processes: this version trains in one; "
            "allowed: one process, with or without accelerate launch"
        )
    half = dtype == "float16"
    AcceleratorState._reset_state()  # an earlier run of this process may have another precision
    accelerator = Accelerator(mixed_precision="fp16" if half else "no")
    if half and accelerator.device.type == "cpu":
        raise UserError(
            "model.dtype = 'float16': needs a GPU; allowed on the CPU: bfloat16, float32"
        )
    return Strategy(accelerator)
