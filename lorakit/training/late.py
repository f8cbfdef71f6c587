"""Numbers that the device still works on, read only when they have arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LateValues:
    """A log line's known part, and the losses, gradient norms and other values of its steps."""

    known: dict[str, Any]
    losses: list[float]
    grad_norms: list[float]
    others: dict[str, list[float]] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The mean over the steps."""
        return sum(self.losses) / len(self.losses)

    def line(self) -> dict[str, Any]:
        """A line of metrics.jsonl: the mean loss, and the last step's gradient norm and others."""
        keys = ("step", "epoch", "loss", "learning_rate", "grad_norm")
        values = {**self.known, "loss": self.loss, "grad_norm": self.grad_norms[-1]}
        values |= {name: column[-1] for name, column in self.others.items()}
        return {key: values.pop(key) for key in keys} | values


class LateReader:
    """Collects scalars of each step: loss, gradient norm and those that ``others`` names.
    ``stage`` sends a line's worth to the host without waiting."""

    def __init__(self, others: Sequence[str] = ()) -> None:
        self._others = tuple(others)
        self._pending: list[Tensor] = []
        self._staged: deque[tuple[dict[str, Any], Tensor, torch.cuda.Event | None]] = deque()

    def window(self) -> list[list[float]]:
        """The scalars of the steps since the last line; waits for the device."""
        values = torch.stack(self._pending).tolist() if self._pending else []
        return [[float(x) for x in row] for row in values]

    def restore_window(self, window: list[list[float]], device: torch.device) -> None:
        self._pending = [torch.tensor(row, device=device) for row in window]

    def add(self, loss: Tensor, grad_norm: Tensor, others: Sequence[Tensor] = ()) -> None:
        assert len(others) == len(self._others)
        values = (loss, grad_norm, *others)
        self._pending.append(torch.stack([value.detach().float() for value in values]))

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
            losses, norms, *others = values.t().tolist()
            found.append(
                LateValues(known, losses, norms, dict(zip(self._others, others, strict=True)))
            )
        return found
