from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from lorakit.errors import UserError
from lorakit.recipe.sections import TrainSection
from lorakit.training.build import (
    build_optimizer,
    build_scheduler,
    check_optimizer,
    check_warmup,
    resolve_warmup_steps,
)

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


def test_adamw_is_the_formula() -> None:
    section = TrainSection(
        output_dir="x", learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6
    )
    parameter = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = build_optimizer([{"params": [parameter], "weight_decay": 0.5}], section)
    w, m, v = parameter.detach().clone().double(), torch.zeros(1, 2), torch.zeros(1, 2)
    for step in (1, 2, 3):
        gradient = torch.tensor([[0.3, -0.1]]) * step
        parameter.grad = gradient.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        hat = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
        w = w * (1 - 0.1 * 0.5) - 0.1 * hat
    torch.testing.assert_close(parameter.detach(), w.float())


def test_an_optimizer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_optimizer("adamw")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"adamw_8bit.*bitsandbytes.*allowed without it: adamw, sgd"
    ):
        check_optimizer("adamw_8bit")


@pytest.mark.parametrize(("ratio", "total", "want"), [(0.06, 1, 0), (0.06, 100, 6), (0.9, 2, 1)])
def test_warmup_leaves_a_step_to_train_in(ratio: float, total: int, want: int) -> None:
    section = TrainSection(output_dir="x", warmup_ratio=ratio)
    assert resolve_warmup_steps(section, total) == want
