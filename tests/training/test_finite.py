from __future__ import annotations

import math

import pytest
import torch

from lorakit.training.checks import broken_step, broken_weight, divergence, grown_loss
from lorakit.training.tracking import LateValues

CAUSE = divergence(0.25, None)


def values(losses: list[float], norms: list[float]) -> LateValues:
    return LateValues({"step": 20, "learning_rate": 0.25}, losses, norms)


def test_fine_steps() -> None:
    assert broken_step(values([1.0, 2.0], [3.0, 1e9]), scaled=False, cause=CAUSE) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_broken_step_and_the_rate_are_named(bad: float) -> None:
    message = broken_step(values([1.0, bad, math.nan], [1.0, 1.0, 1.0]), scaled=False, cause=CAUSE)
    assert message is not None
    assert message.startswith(f"step 19: the loss is {bad}; ")
    assert "train.learning_rate (0.25)" in message


def test_a_gradient_that_grew_is_the_cause() -> None:
    message = broken_step(values([1.0, math.nan], [5e4, math.nan]), scaled=False, cause=CAUSE)
    assert message is not None
    assert "the gradient grew to 5e+04 before" in message


def test_a_gradient_that_overflows_is_skipped_in_float16_only() -> None:
    overflown = values([1.0], [math.inf])
    assert broken_step(overflown, scaled=True, cause=CAUSE) is None
    message = broken_step(overflown, scaled=False, cause=CAUSE)
    assert message is not None
    assert "step 20: the gradient is not finite" in message
    assert broken_step(values([math.nan], [1.0]), scaled=True, cause=CAUSE) is not None


def test_weights() -> None:
    weights = {"a": torch.ones(2), "b": torch.tensor([1.0, math.inf]), "c": torch.tensor(math.nan)}
    assert broken_weight(weights) == "b"
    assert broken_weight({"a": torch.ones(2)}) is None


@pytest.mark.parametrize(
    ("first", "loss", "grown"),
    [
        (2.0, 6.1, True),
        (2.0, 6.0, False),  # not more than 3 times
        (0.1, 1.0, False),  # a small loss that swings
        (0.1, 1.2, True),
        (2.0, 1.0, False),
        (0.0, 1.5, True),
    ],
)
def test_a_finite_loss_far_above_the_first(first: float, loss: float, grown: bool) -> None:
    message = grown_loss(values([loss - 0.5, loss + 0.5], [1.0, 1.0]), first, "too high")
    assert (message is not None) == grown
    if message is not None:
        assert message == (
            f"step 20: the loss is {loss:.4g}, at the start it was {first:.4g}; likely cause: too high"
        )


def test_the_method_s_advice_stands_beside_the_rate() -> None:
    cause = divergence(0.25, "adapter.x (3) too high")
    told = (
        broken_step(values([math.nan], [1.0]), False, cause),
        broken_step(values([1.0, math.nan], [5e4, 1.0]), False, cause),
    )
    for message in told:
        assert message is not None
        assert "too high, or adapter.x (3) too high" in message
