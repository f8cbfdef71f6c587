"""The best model of a run so far, by its evaluations, and when there is no use in going on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.tasks.base import LOWER_IS_BETTER
from lorakit.training.checkpoint import Progress


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
