"""Numbers that the device still works on, read only when they have arrived."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LateValues:
    """A log line's known part, and the losses and gradient norms of its steps."""

    known: dict[str, Any]
    losses: list[float]
    grad_norms: list[float]

    def line(self) -> dict[str, Any]:
        """A line of metrics.jsonl: the mean loss, and the last step's gradient norm."""
        loss = sum(self.losses) / len(self.losses)
        keys = ("step", "epoch", "loss", "learning_rate", "grad_norm")
        values = {**self.known, "loss": loss, "grad_norm": self.grad_norms[-1]}
        return {key: values.pop(key) for key in keys} | values


class LateReader:
    """Collects a scalar pair a step; ``stage`` sends a line's worth to the host without waiting."""

    def __init__(self) -> None:
        self._pending: list[Tensor] = []
        self._staged: deque[tuple[dict[str, Any], Tensor, torch.cuda.Event | None]] = deque()

    def window(self) -> list[list[float]]:
        """Loss and gradient norm of the steps since the last line; waits for the device."""
        values = torch.stack(self._pending).tolist() if self._pending else []
        return [[float(x) for x in pair] for pair in values]

    def restore_window(self, window: list[list[float]], device: torch.device) -> None:
        self._pending = [torch.tensor(pair, device=device) for pair in window]

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        self._pending.append(torch.stack((loss.float(), grad_norm.float())))

    def stage(self, known: dict[str, Any]) -> None:
        if not self._pending:
            return
        values = torch.stack(self._pending)
        self._pending = []
        event = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._staged.append((known, values, event))

    def arrived(self, wait: bool = False) -> list[LateValues]:
        """The staged lines that are there, oldest first; with ``wait`` all of them."""
        found = []
        while self._staged:
            known, values, event = self._staged[0]
            if event is not None and not wait and not event.query():
                break
            if event is not None:
                event.synchronize()
            self._staged.popleft()
            losses, norms = values.t().tolist()
            found.append(LateValues(known, losses, norms))
        return found
