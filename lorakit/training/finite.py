"""What is no longer finite, or on its way there, and the likely cause."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.training.late import LateValues


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


def _likely_cause(values: LateValues, index: int, scaled: bool, cause: str) -> str:
    earlier = [norm for norm in values.grad_norms[:index] if math.isfinite(norm)]
    if earlier and max(earlier) > 100:
        return f"the gradient grew to {max(earlier):.3g} before: {cause}"
    overflow = ", or float16 overflow (bfloat16 has the range)" if scaled else ""
    return f"likely cause: {cause}{overflow}"
