"""When a step logs, evaluates and saves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The last step logs, evaluates and saves whatever its number."""

    total_steps: int
    steps_per_epoch: int
    log_every_steps: int
    eval_every_steps: int
    save_every_steps: int
    save_total_limit: int | None

    def due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.total_steps
