"""The clock of a run's steps, which members of a joint training share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.training.clock import Clock, StepWindow
from tests.training.joint_runs import members, train_together
from tests.training.runs import run_json


def test_a_clock_stands_still_in_nested_pauses() -> None:
    clock = Clock()
    with clock.paused():
        began = clock.now()
        with clock.paused():
            time.sleep(0.05)
        time.sleep(0.05)
        assert clock.now() == began
    assert clock.now() - began < 0.05


def test_a_window_leaves_out_pauses_and_evaluations() -> None:
    clock = Clock()
    window = StepWindow(clock, torch.device("cpu"))
    window.tokens += 40
    time.sleep(0.1)
    with clock.paused():
        time.sleep(0.2)
    window.skip(0.06)  # an evaluation
    speed = window.end()
    time.sleep(0.2)
    assert speed() == pytest.approx(40 / 0.04, rel=0.5)
    assert window.tokens == 0
    window.tokens += 40
    time.sleep(0.1)
    assert window.end()() == pytest.approx(40 / 0.3, rel=0.3)


def test_members_do_not_count_what_others_prepare(tiny_llama: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"train__seed": 2}]
    recipes = members(tmp_path, tiny_llama, "completion", changes, train__epochs=1)
    slept = []

    def say_of(index: int) -> Any:
        def say(text: str) -> None:
            if index and "evaluation:" not in text:
                time.sleep(2.0)
                slept.append(2.0)

        return say

    train_together(recipes, say_of=say_of)
    for recipe in recipes:
        assert run_json(Path(recipe.train.output_dir))["seconds"] < sum(slept)
