"""What is no longer finite, or on its way there, and the likely cause."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorakit.training.late import LateValues

#: So many steps at the end of a run are averaged.
_LAST_STEPS = 10


def divergence(learning_rate: float, advice: str | None) -> str:
    """Why weights are likely to diverge; ``advice`` is what the method has to say to it."""
    return f"train.learning_rate ({learning_rate:g}) too high" + (
        f", or {advice}" if advice else ""
    )


def broken_step(values: LateValues, scaled: bool, cause: str) -> str | None:
    """The first step whose loss or gradient is not finite, in words.

    ``scaled``: float16's gradient scaler leaves out a step whose gradient is not finite.
    ``cause``: of a divergence.
    """
    for index, (loss, norm) in enumerate(zip(values.losses, values.grad_norms, strict=True)):
        step = values.known["step"] - len(values.losses) + 1 + index
        why = _likely_cause(values, index, scaled, cause)
        if not math.isfinite(loss):
            return f"step {step}: the loss is {loss}; {why}"
        if not math.isfinite(norm) and not scaled:
            return f"step {step}: the gradient is not finite; {why}"
    return None


def broken_weight(weights: Mapping[str, Tensor]) -> str | None:
    """The first weight that is not finite; waits for the device once."""
    finite = torch.stack([weight.detach().isfinite().all() for weight in weights.values()])
    return next(
        (name for name, fine in zip(weights, finite.tolist(), strict=True) if not fine), None
    )


def grown_loss(values: LateValues, first: float, cause: str) -> str | None:
    """A finite loss far above that of the run's ``first`` log line, in words: more than 3 times
    it and more than 1 above it, so that neither a small loss nor an ordinary swing is one."""
    if not (values.loss > 3 * first and values.loss > first + 1):
        return None
    return (
        f"step {values.known['step']}: the loss is {values.loss:.4g}, at the start it was "
        f"{first:.4g}; likely cause: {cause}"
    )


@dataclass
class LossHistory:
    """``start`` is the loss of the first step, whose weights are the untrained ones; ``peak`` the
    highest of a step; ``last`` those of the last steps, oldest first."""

    start: float | None = None
    peak: float = -math.inf
    last: list[float] = field(default_factory=list)

    def add(self, losses: Sequence[float]) -> None:
        """The losses of the next steps."""
        if self.start is None and losses:
            self.start = losses[0]
        self.peak = max(self.peak, *losses)
        self.last = [*self.last, *losses][-_LAST_STEPS:]


def diverged(history: LossHistory, again: float | None) -> bool:
    """Whether a run with finite losses left the model worse than it was.

    ``again`` is the loss that the first step's rows have after the training (None: not known); it
    is compared with ``history.start``, the loss of the same rows before, so that no difference
    between rows counts. The run diverged if ``again`` and the mean of the last steps are both more
    than 1.5 times the start and more than 1 above it; or if a step's loss was more than 10 times
    the start and more than 10 above it, and both ended above 0.9 of the start.
    """
    if history.start is None:
        return False
    start, mean = history.start, sum(history.last) / len(history.last)
    end = mean if again is None else min(again, mean)
    if not math.isfinite(end):
        return True
    if end > max(1.5 * start, start + 1):
        return True
    return history.peak > max(10 * start, start + 10) and end > 0.9 * start


def divergence_note(history: LossHistory, again: float | None, cause: str) -> str:
    """What a run that ``diverged`` says at its end."""
    assert history.start is not None
    before = f"{history.start:.4g} at the start, {history.peak:.4g} at its highest"
    if again is not None:
        now = f"and {again:.4g} at the end, on the rows of the first step"
    else:
        now = f"and {sum(history.last) / len(history.last):.4g} at the end"
    return f"the run diverged: the loss was {before} {now}; likely cause: {cause}"


def _likely_cause(values: LateValues, index: int, scaled: bool, cause: str) -> str:
    earlier = [norm for norm in values.grad_norms[:index] if math.isfinite(norm)]
    if earlier and max(earlier) > 100:
        return f"the gradient grew to {max(earlier):.3g} before: {cause}"
    overflow = ", or float16 overflow (bfloat16 has the range)" if scaled else ""
    return f"likely cause: {cause}{overflow}"
