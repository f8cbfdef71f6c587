"""Learning rates: their formulas, and the values of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from transformers import get_scheduler

from lorakit.errors import UserError
from lorakit.recipe.sections import TrainSection
from lorakit.training.build import build_optimizer
from lorakit.training.learning_rate import build_scheduler, check_warmup, resolve_warmup_steps

STEPS, WARMUP, PEAK = 20, 4, 2.0


def done(step: int) -> float:
    """Return the completed share of the steps after warmup."""
    return (step - WARMUP) / (STEPS - WARMUP)


SHAPES: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 1.0,
    "linear": lambda step: 1 - done(step),
    "cosine": lambda step: (1 + math.cos(math.pi * done(step))) / 2,
    "cosine_with_restarts": lambda step: (
        (1 + math.cos(math.pi * done(step))) / 2 if step < STEPS else 0.0
    ),
    "polynomial": lambda step: (1e-7 + (PEAK - 1e-7) * (1 - done(step))) / PEAK,
    "inverse_sqrt": lambda step: 1 / math.sqrt(step / WARMUP),
}


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    check_warmup(TrainSection(output_dir="x", warmup_steps=30), 30)
    check_warmup(TrainSection(output_dir="x"), 1)  # the default ratio fits any run
    with pytest.raises(UserError) as raised:
        check_warmup(TrainSection(output_dir="x", warmup_steps=31), 30)
    message = "train.warmup_steps = 31: longer than the run of 30 steps; allowed: 0 to 30"
    assert str(raised.value) == message


@pytest.mark.parametrize("name", SHAPES)
def test_schedules_follow_their_formula(name: str) -> None:
    """Warmup from 0, then the schedule: the rate of step n is that after n - 1 scheduler steps."""
    section = TrainSection(
        output_dir="x", learning_rate=PEAK, lr_scheduler=name, warmup_steps=WARMUP, optimizer="sgd"
    )
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = build_optimizer([{"params": [parameter]}], section)
    scheduler = build_scheduler(optimizer, section, STEPS)
    for step in range(STEPS + 1):
        want = step / WARMUP if step < WARMUP else SHAPES[name](step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(PEAK * want, abs=1e-9), step
        parameter.grad = torch.ones(2, 2)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("name", "steps", "warmup"),
    [
        (name, steps, warmup)
        for name in SHAPES
        for steps, warmup in [(20, 4), (7, 0), (13, 13), (1, 0), (101, 7)]
        if name != "polynomial" or warmup < steps  # transformers divides by zero
    ],
)
def test_rates_are_those_of_transformers_to_the_bit(name: str, steps: int, warmup: int) -> None:
    section = TrainSection(
        output_dir="x", learning_rate=3e-4, lr_scheduler=name, warmup_steps=warmup
    )
    rates = []
    for theirs in (False, True):
        optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2))]}], section)
        own_name = "constant_with_warmup" if name == "constant" else name
        scheduler = (
            get_scheduler(own_name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
            if theirs
            else build_scheduler(optimizer, section, steps)
        )
        optimizer.step()  # has no gradients
        own = []
        for _ in range(steps + 2):
            own.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        rates.append((own, scheduler.state_dict()))
    assert rates[0][0] == rates[1][0]
    assert rates[0][1].keys() == rates[1][1].keys()


def test_a_peak_below_the_last_rate_of_polynomial() -> None:
    section = TrainSection(output_dir="x", learning_rate=1e-9, lr_scheduler="polynomial")
    optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2))]}], section)
    scheduler = build_scheduler(optimizer, section, 10)
    assert scheduler.lr_lambdas[0](10) == 1


def test_every_schedule_is_tested() -> None:
    allowed = TrainSection.model_fields["lr_scheduler"].annotation
    assert set(SHAPES) == set(allowed.__args__)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("keys", "steps", "want"),
    [
        ({"warmup_steps": 3}, 100, 3),
        ({"warmup_steps": 0}, 100, 0),
        ({"warmup_ratio": 0.06}, 100, 6),
        ({"warmup_ratio": 0.06}, 101, 7),
        ({"warmup_ratio": 0.0}, 100, 0),
        ({}, 50, 3),
    ],
)
def test_warmup(keys: dict[str, float], steps: int, want: int) -> None:
    assert resolve_warmup_steps(TrainSection(output_dir="x", **keys), steps) == want


@pytest.mark.parametrize(("ratio", "total", "want"), [(0.06, 1, 0), (0.06, 100, 6), (0.9, 2, 1)])
def test_warmup_leaves_a_step_to_train_in(ratio: float, total: int, want: int) -> None:
    section = TrainSection(output_dir="x", warmup_ratio=ratio)
    assert resolve_warmup_steps(section, total) == want
