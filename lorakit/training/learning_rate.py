"""The learning rate of each step, as a share of its peak.

The rates are those of ``transformers.get_scheduler`` to the bit, except where that fails: with
``polynomial`` after a warmup of all steps, or below its last rate. Importing it takes a second
where PEFT and bitsandbytes are installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

from lorakit.errors import UserError
from lorakit.recipe.sections import TrainSection

#: With ``polynomial``, the rate at the end of the run.
_LAST_RATE = 1e-7
#: With ``inverse_sqrt`` and no warmup, the steps after which the rate begins to fall notably.
_TIMESCALE_STEPS = 10_000
#: Gets the step, the warmup steps and all steps, and returns a share of the peak.
_Shape = Callable[[int, int, int], float]


def build_scheduler(
    optimizer: torch.optim.Optimizer, section: TrainSection, total_steps: int
) -> LambdaLR:
    """Linear warmup from 0 to the peak, then ``section.lr_scheduler`` for the remaining steps."""
    return LambdaLR(optimizer, shares_of_peak(section, total_steps))


def shares_of_peak(section: TrainSection, total_steps: int) -> Callable[[int], float]:
    """Return a function from the steps taken so far to the next step's share of the peak."""
    warmup_steps = resolve_warmup_steps(section, total_steps)
    return partial(_share, _shape_of(section), warmup_steps, total_steps)


def check_warmup(section: TrainSection, total_steps: int) -> None:
    """Raise UserError for a warmup that is longer than the run."""
    if section.warmup_steps is not None and section.warmup_steps > total_steps:
        raise UserError(
            f"train.warmup_steps = {section.warmup_steps}: longer than the run of {total_steps} "
            f"steps; allowed: 0 to {total_steps}"
        )


def resolve_warmup_steps(section: TrainSection, total_steps: int) -> int:
    """Return ``warmup_steps``, or ``warmup_ratio`` of all steps, rounded up but at least one step
    less than the run."""
    if section.warmup_steps is not None:
        return section.warmup_steps
    return min(math.ceil((section.warmup_ratio or 0.0) * total_steps), total_steps - 1)


def _share(shape: _Shape, warmup_steps: int, total_steps: int, step: int) -> float:
    if step < warmup_steps:
        return step / warmup_steps
    return shape(step, warmup_steps, total_steps)


def _done(step: int, warmup_steps: int, total_steps: int) -> float:
    """The share of the steps after the warmup."""
    return (step - warmup_steps) / max(1, total_steps - warmup_steps)


def _linear(step: int, warmup_steps: int, total_steps: int) -> float:
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def _cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    return max(0.0, 0.5 * (1 + math.cos(math.pi * _done(step, warmup_steps, total_steps))))


def _cosine_with_restarts(step: int, warmup_steps: int, total_steps: int) -> float:
    """One cycle: as ``cosine``, but zero after it."""
    is_over = _done(step, warmup_steps, total_steps) >= 1
    return 0.0 if is_over else _cosine(step, warmup_steps, total_steps)


def _polynomial(step: int, warmup_steps: int, total_steps: int, peak: float) -> float:
    """Of power 1, down to ``_LAST_RATE``, or to a lower ``peak``."""
    last = min(_LAST_RATE, peak)
    if step > total_steps:
        return last / peak
    left = 1 - _done(step, warmup_steps, total_steps)
    return ((peak - last) * left + last) / peak


def _inverse_sqrt(step: int, warmup_steps: int, total_steps: int) -> float:
    timescale = warmup_steps or _TIMESCALE_STEPS
    return 1 / math.sqrt((step + timescale - warmup_steps) / timescale)


def _constant(step: int, warmup_steps: int, total_steps: int) -> float:
    return 1.0


_SHAPES: dict[str, _Shape] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "inverse_sqrt": _inverse_sqrt,
}


def _shape_of(section: TrainSection) -> _Shape:
    if section.lr_scheduler == "polynomial":
        return partial(_polynomial, peak=section.learning_rate)
    return _SHAPES[section.lr_scheduler]
