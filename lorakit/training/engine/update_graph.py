"""Replay the updates of many weights as one CUDA graph: the method's gradients, clipping and AdamW.

For hundreds of small factors, the host needs longer to launch these kernels than the device needs
to run them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorakit.methods.base import RunHooks
from lorakit.training.engine.capture import capturing
from lorakit.training.engine.eager import EagerEngine


def can_capture(engine: EagerEngine) -> bool:
    """Whether every step launches the same kernels on the same memory: with AdamW, in whose state
    the step count is a tensor, and a method that adds the same terms in every step."""
    optimizer = _optimizer(engine)
    adds_nothing = type(engine.hooks).before_step is RunHooks.before_step
    return (
        type(optimizer) is torch.optim.AdamW
        and not engine.scales_loss
        and (engine.hooks.adds_same_terms or adds_nothing)
        and all(parameter.grad is not None for parameter in engine.parameters.values())
        and len(optimizer.state) == len(engine.parameters)
    )


class UpdateGraph:
    """Captures ``change_weights`` of ``engines``. The learning rates, which change from step to
    step, are read from tensors."""

    def __init__(self, engines: Sequence[EagerEngine], pool: Any) -> None:
        self._groups = [group for each in engines for group in _optimizer(each).param_groups]
        device = self._groups[0]["params"][0].device
        self._rates = torch.zeros(len(self._groups), device=device)
        self._graph = torch.cuda.CUDAGraph()
        with self._tensor_rates(), capturing(self._graph, pool):
            self._scalars = [engine.change_weights() for engine in engines]

    def replay(self) -> list[list[Tensor]]:
        """Change the weights; return what ``change_weights`` of each engine returns, which the next
        replay overwrites."""
        rates = torch.tensor([float(group["lr"]) for group in self._groups]).pin_memory()
        self._rates.copy_(rates, non_blocking=True)
        self._graph.replay()
        return self._scalars

    @contextmanager
    def _tensor_rates(self) -> Iterator[None]:
        before = [(group["lr"], group["capturable"]) for group in self._groups]
        for rate, group in zip(self._rates.unbind(0), self._groups, strict=True):
            group["lr"], group["capturable"] = rate, True
        try:
            yield
        finally:
            for group, (rate, capturable) in zip(self._groups, before, strict=True):
                group["lr"], group["capturable"] = rate, capturable


def _optimizer(engine: EagerEngine) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)
