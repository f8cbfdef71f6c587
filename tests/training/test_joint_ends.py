"""How members of a joint training end: early, with an error, or stopped by a signal and resumed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from lorakit.errors import Interrupted, TargetError, TrainingError, UserError
from lorakit.recipe.sections import Recipe
from lorakit.training.joint import can_join, train_joint
from lorakit.training.session import RunResult
from tests.training.joint_runs import (
    assert_equal_runs,
    assert_equal_to_single_runs,
    assert_equal_training,
    members,
    train_alone,
    train_together,
)
from tests.training.runs import changed, checkpoint_names, eval_lines, run_json


def test_a_member_that_stops_early_leaves_the_others(tiny_llama: Path, tmp_path: Path) -> None:
    changes = [
        {"train__early_stopping_patience": 1, "train__learning_rate": 10.0},
        {"train__seed": 3},
        {"train__max_steps": 3, "train__epochs": None},
    ]
    recipes = members(
        tmp_path, tiny_llama, "completion", changes, train__eval_every_steps=2,
        train__max_grad_norm=1e-3, train__epochs=4,
    )  # fmt: skip
    assert_equal_to_single_runs(recipes)
    steps = [run_json(Path(recipe.train.output_dir))["steps"] for recipe in recipes]
    assert steps[0] < steps[1]
    assert steps[2] == 3


def test_the_error_of_a_member_does_not_end_the_others(tiny_llama: Path, tmp_path: Path) -> None:
    changes = [
        {"train__seed": 3},
        {"adapter__target_modules": ["nowhere"]},
        {"train__learning_rate": 1e30, "train__max_grad_norm": None, "train__optimizer": "sgd"},
        {"train__seed": 4},
    ]
    recipes = members(tmp_path, tiny_llama, "completion", changes)
    results = train_together(recipes)
    assert isinstance(results[1], TargetError)
    assert not Path(recipes[1].train.output_dir).exists()
    assert isinstance(results[2], TrainingError)
    assert results[2].__traceback__ is None, "which would keep what it refers to on the device"
    assert run_json(Path(recipes[2].train.output_dir))["exit_reason"] == "failed"
    for index in (0, 3):
        assert_equal_runs(Path(recipes[index].train.output_dir), train_alone(recipes[index]))


def test_members_end_as_soon_as_they_are_done(tiny_llama: Path, tmp_path: Path) -> None:
    changes = [{"train__epochs": None, "train__max_steps": steps} for steps in (6, 2, 4)]
    ended: list[int] = []
    train_joint(
        members(tmp_path, tiny_llama, "completion", changes),
        None,
        lambda text: None,
        lambda index, result: ended.append(index),
    )
    assert ended == [1, 2, 0]


class StopAfter:
    """Sends a signal when a member has been evaluated at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, index: int, step: int, metrics: dict[str, float] | None) -> bool:
        if step == self.step and metrics is not None:
            signal.raise_signal(signal.SIGTERM)
            self.step = 0
        return False


@pytest.mark.parametrize("task", ["completion", "glue/sst2"])
def test_stopped_members_resume_as_if_they_had_not_been(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path, task: str
) -> None:
    """With dropout, and members of several lengths, of which one has ended by then."""
    adalora = {
        "method": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 3, "deltaT": 1,
        "lora_dropout": 0.1, "target_modules": ["q", "v"],
    }  # fmt: skip
    changes = [
        {"train__seed": 3, "adapter__lora_dropout": 0.1},
        {"train__epochs": None, "train__max_steps": 2},
        {"adapter": adalora},
        {"train__seed": 4, "adapter__r": 2},
    ]
    model = tiny_llama if task == "completion" else tiny_bert
    recipes = members(tmp_path, model, task, changes)
    ended: list[int] = []

    def finished(index: int, result: RunResult | Exception) -> None:
        ended.append(index)

    with pytest.raises(Interrupted, match="1 of 4 runs have finished") as stopped:
        train_together(recipes, stop_at=StopAfter(4), finished=finished)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert ended == [1]
    for index in (0, 2, 3):
        folder = Path(recipes[index].train.output_dir)
        assert run_json(folder)["exit_reason"] == "interrupted"
        assert checkpoint_names(folder) == ["step-4", "step-5"]
    results = train_together(recipes, resume="auto")
    for recipe, result in zip(recipes, results, strict=True):
        assert isinstance(result, RunResult)
        assert_equal_training(result.output_dir, train_alone(recipe))


def test_a_finished_member_is_not_trained_again(tiny_llama: Path, tmp_path: Path) -> None:
    recipes = members(tmp_path, tiny_llama, "completion", [{}, {"train__seed": 3}])
    first = train_together(recipes)
    assert train_together(recipes, resume="auto") == first
    assert all(isinstance(result, UserError) for result in train_together(recipes))


def test_the_caller_ends_members_after_an_evaluation(tiny_llama: Path, tmp_path: Path) -> None:
    """All members of a step have been evaluated when the first of them is asked about."""
    changes = [{"train__seed": seed} for seed in (1, 2, 3)]
    recipes = members(tmp_path, tiny_llama, "completion", changes, train__eval_every_steps=2)
    asked: list[tuple[int, int]] = []

    def stop_at(index: int, step: int, metrics: dict[str, float] | None) -> bool:
        assert metrics is not None
        for recipe in (recipes[0], recipes[2]):
            assert eval_lines(Path(recipe.train.output_dir))[-1]["step"] == step
        asked.append((index, step))
        return step == 2 and index == 1

    results = train_together(recipes, stop_at=stop_at)
    assert [r.steps for r in results if isinstance(r, RunResult)] == [8, 2, 8]
    assert asked == [(0, 2), (1, 2), (2, 2), (0, 4), (2, 4), (0, 6), (2, 6)]
    for index in (0, 2):
        assert_equal_runs(Path(recipes[index].train.output_dir), train_alone(recipes[index]))
    assert run_json(Path(recipes[1].train.output_dir))["exit_reason"] == "completed"


CANNOT = {
    "model.dtype": {"model__dtype": "bfloat16"},
    "task.packing": {"task__packing": True},
    "train.kernels": {"train__kernels": "torch"},
    "train.compile": {"train__compile": True},
    "train.per_device_batch_size": {"train__per_device_batch_size": "auto"},
    "model.add_tokens": {"model__add_tokens": ["<a>"]},
    "model.chat_template": {"model__chat_template": "chatml"},
    "model.base_precision": {"model__base_precision": "nf4"},
}


@pytest.mark.parametrize("key", CANNOT)
def test_recipes_that_cannot_be_joined(tiny_llama: Path, tmp_path: Path, key: str) -> None:
    [one] = members(tmp_path, tiny_llama, "completion", [{}])
    other = changed(one, **CANNOT[key])
    for pair in ((one, other), (other, one)):
        reason = can_join(*pair)
        assert reason is not None
        assert key in reason


def test_recipes_that_can_be_joined(tiny_llama: Path, tmp_path: Path) -> None:
    [one] = members(tmp_path, tiny_llama, "completion", [{}])
    other = changed(
        one, adapter__r=2, train__seed=1, train__epochs=1, train__per_device_batch_size=2
    )
    assert can_join(one, other) is None
    assert can_join(one, one) is None


def test_methods_that_share_little_cannot_be_joined(tiny_llama: Path, tmp_path: Path) -> None:
    found: list[Recipe] = []
    for method in ("full", "bitfit", "intrinsic"):
        adapter = {"adapter": {"method": method}}
        found += members(tmp_path / method, tiny_llama, "completion", [adapter])
    reasons = [can_join(recipe, recipe) for recipe in found]
    assert reasons == [
        *[f"adapter.method = {m} trains the base" for m in ("full", "bitfit")],
        "adapter.method = intrinsic computes updates as large as the base for each run",
    ]
