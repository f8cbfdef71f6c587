"""What is no longer finite, or on its way there, and the likely cause."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.training.late import LateValues


def broken_step(values: LateValues, scaled: bool, advice: str | None = None) -> str | None:
    """The first step whose loss or gradient is not finite, in words.

    ``scaled``: float16's gradient scaler leaves out a step whose gradient is not finite.
    ``advice``: what else to lower than the learning rate.
    """
    for index, (loss, norm) in enumerate(zip(values.losses, values.grad_norms, strict=True)):
        step = values.known["step"] - len(values.losses) + 1 + index
        if not math.isfinite(loss):
            return f"step {step}: the loss is {loss}; {_likely_cause(values, index, advice)}"
        if not math.isfinite(norm) and not scaled:
            return (
                f"step {step}: the gradient is not finite; {_likely_cause(values, index, advice)}"
            )
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


def _likely_cause(values: LateValues, index: int, advice: str | None) -> str:
    also = f", or {advice}" if advice else ""
    rate = values.known["learning_rate"]
    earlier = [norm for norm in values.grad_norms[:index] if math.isfinite(norm)]
    if earlier and max(earlier) > 100:
        grown = f"the gradient grew to {max(earlier):.3g} before"
        return f"{grown}: train.learning_rate ({rate:g}) too high{also}"
    return (
        f"likely causes: train.learning_rate ({rate:g}) too high{also}, or float16 overflow "
        "(bfloat16 has the range)"
    )
