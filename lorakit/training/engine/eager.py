"""Optimizer and schedule."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from lorakit.errors import UserError
from lorakit.recipe.sections import TrainSection


def check_optimizer(name: str) -> None:
    """Raise UserError for an optimizer whose package is not installed."""
    if name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer = 'adamw_8bit': needs bitsandbytes (pip install 'lorakit[gpu]'); "
            "allowed without it: adamw, sgd"
        )


def build_optimizer(
    groups: Iterable[dict[str, Any]], section: TrainSection
) -> torch.optim.Optimizer:
    """The optimizer of ``section.optimizer``; torch's own take their fused form."""
    groups = list(groups)
    adam = {
        "lr": section.learning_rate,
        "betas": (section.adam_beta1, section.adam_beta2),
        "eps": section.adam_epsilon,
    }
    if section.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=section.learning_rate, fused=True)
    if section.optimizer == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=True)  # type: ignore[arg-type]
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **adam)
    return optimizer


def build_scheduler(
    optimizer: torch.optim.Optimizer, section: TrainSection, total_steps: int
) -> LRScheduler:
    """Warmup from 0 to the peak, then ``section.lr_scheduler`` over the rest of the steps."""
    from transformers import get_scheduler

    warmup_steps = resolve_warmup_steps(section, total_steps)
    name: str = section.lr_scheduler
    if name == "constant" and warmup_steps:
        name = "constant_with_warmup"
    scheduler: LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
    return scheduler


def check_warmup(section: TrainSection, total_steps: int) -> None:
    """Raise UserError for a warmup that the run ends before."""
    if section.warmup_steps is not None and section.warmup_steps > total_steps:
        raise UserError(
            f"train.warmup_steps = {section.warmup_steps}: longer than the run, which has "
            f"{total_steps} steps; allowed: 0 to {total_steps}"
        )


def resolve_warmup_steps(section: TrainSection, total_steps: int) -> int:
    """``warmup_steps``, or the ratio of all steps rounded up; it leaves a step to train in."""
    if section.warmup_steps is not None:
        return section.warmup_steps
    return min(math.ceil((section.warmup_ratio or 0.0) * total_steps), total_steps - 1)
