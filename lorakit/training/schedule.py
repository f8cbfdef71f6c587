"""When a step logs, evaluates and saves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The last step logs, evaluates and saves whatever its number. ``steps_per_epoch`` is None
    for a stream."""

    total_steps: int
    steps_per_epoch: int | None
    log_every_steps: int
    eval_every_steps: int
    save_every_steps: int
    save_total_limit: int | None

    def due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.total_steps

    def epoch(self, step: int) -> float | None:
        """How many times the rows have been seen; None where nobody knows."""
        return round(step / self.steps_per_epoch, 4) if self.steps_per_epoch else None
