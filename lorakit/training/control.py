"""When a step logs, evaluates and saves.

SIGINT, SIGTERM and SIGHUP ask the loop to stop at the next step; a second one stops at once.

The best model of a run so far, by its evaluations, and when there is no use in going on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor

from lorakit.errors import Interrupted
from lorakit.tasks.base import LOWER_IS_BETTER
from lorakit.training.checkpoint import Progress


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


class StopRequest:
    """``signal_number`` is 0 until a signal arrives."""

    def __init__(self) -> None:
        self.signal_number = 0

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number:
            raise Interrupted("stopped at once by a second signal", number)
        self.signal_number = number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch them while the block runs (in the main thread; elsewhere nothing is caught).

    A signal that is ignored, as SIGHUP under nohup, stays so.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    every = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    numbers = [number for number in every if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, request._on_signal) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Best:
    """``weights`` are those of the best evaluation by ``metric``, in the host's memory; None
    before the first. After ``patience`` evaluations without a better one the run stops."""

    metric: str
    patience: int | None
    weights: dict[str, Tensor] | None = None

    def compare(
        self, metrics: dict[str, float], trainable: Mapping[str, Tensor], progress: Progress
    ) -> str | None:
        """Keep the weights if ``metrics`` are the best so far; what to say if the run stops."""
        if self.is_gain(metrics, progress.best_metrics):
            progress.best_metrics, progress.best_step = metrics, progress.step
            progress.evaluations_without_gain = 0
            self.weights = {n: p.detach().cpu().clone() for n, p in trainable.items()}
            return None
        progress.evaluations_without_gain += 1
        if not self.patience or progress.evaluations_without_gain < self.patience:
            return None
        progress.stopped_early = True
        return (
            f"step {progress.step}: {self.metric} has not improved for {self.patience} "
            f"evaluations; stopping early, the best was at step {progress.best_step}"
        )

    def is_gain(self, metrics: Mapping[str, float], best: Mapping[str, float]) -> bool:
        """Whether ``metrics`` beat ``best`` (empty at first); of equals the one of lower loss."""
        if not best:
            return True
        if metrics[self.metric] != best[self.metric]:
            return (metrics[self.metric] < best[self.metric]) == (self.metric in LOWER_IS_BETTER)
        return metrics["loss"] < best["loss"]

    @torch.no_grad()
    def restore(self, trainable: Mapping[str, Tensor]) -> None:
        """Put the weights back, if there are any."""
        for name, value in (self.weights or {}).items():
            trainable[name].copy_(value)
