"""The engine of a run whose passes are computed together with those of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorakit.data.collate import Batch
from lorakit.training.engine import StepResult
from lorakit.training.engine.eager import EagerEngine


@dataclass
class MemberEngine(EagerEngine):
    """Updates the weights of one run. ``training.joint`` computes the gradients, and clears those
    of all runs after each step."""

    keeps_gradients: ClassVar[bool] = True

    def step(self, micro_batches: Sequence[Batch], loss_count: float | None = None) -> StepResult:
        raise NotImplementedError("the passes of a member are computed by training.joint")

    def discard_gradients(self) -> None:
        """They are cleared together."""
