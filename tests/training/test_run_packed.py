"""Runs on packed rows and on batches by tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit.errors import RecipeError
from lorakit.training.run import dry_run, train
from tests.training.runs import log_lines, recipe_for, run_json


def test_one_step_over_all_rows_is_the_same_packed(tiny_llama: Path, tmp_path: Path) -> None:
    """The loss is the mean over the step's trained tokens, regardless of the layout of rows."""
    runs = {}
    for name, changes in {
        "padded": {}, "packed": {"task__packing": True},
        "pieces": {"task__packing": True, "train__per_device_batch_size": 1,
                   "train__gradient_accumulation_steps": 30},
    }.items():  # fmt: skip
        recipe = recipe_for(
            tmp_path / name, tiny_llama, train__epochs=3, adapter__init="b_gaussian",
            **({"train__per_device_batch_size": 30} | changes),
        )  # fmt: skip
        train(recipe)
        runs[name] = Path(recipe.train.output_dir)
    want = load_file(runs["padded"] / "adapter" / "adapter_model.safetensors")
    for name in ("packed", "pieces"):
        for ours, theirs in zip(log_lines(runs[name]), log_lines(runs["padded"]), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        found = load_file(runs[name] / "adapter" / "adapter_model.safetensors")
        for key, value in want.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-4)
        assert run_json(runs[name])["trained_tokens"] == run_json(runs["padded"])["trained_tokens"]


def test_gradient_checkpointing_keeps_packed_rows_apart(tiny_llama: Path, tmp_path: Path) -> None:
    adapters = []
    for spare in (False, True):
        recipe = recipe_for(
            tmp_path / str(spare), tiny_llama, task__packing=True, train__epochs=2,
            train__per_device_batch_size=1, train__gradient_checkpointing=spare,
        )  # fmt: skip
        train(recipe)
        adapters.append(
            load_file(Path(recipe.train.output_dir) / "adapter/adapter_model.safetensors")
        )
    for key, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", ["completion", "glue/sst2"])
def test_a_token_budget_bounds_the_batches(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path, task: str
) -> None:
    recipe = recipe_for(
        tmp_path, tiny_llama if task == "completion" else tiny_bert, task,
        train__max_tokens_per_batch=128, train__per_device_batch_size=None,
    )  # fmt: skip
    plan = dry_run(recipe, lambda text: None)
    said: list[str] = []
    train(recipe, say=said.append)
    assert any("up to 128 tokens per step" in line for line in said)
    assert run_json(Path(recipe.train.output_dir))["steps"] == plan["steps"] > 2


def test_a_batch_of_an_evaluation_does_not_bound_the_bins_of_training(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(
        tmp_path, tiny_llama, task__packing=True, train__max_tokens_per_batch=512,
        train__per_device_batch_size=None, train__per_device_eval_batch_size=1,
    )  # fmt: skip
    said: list[str] = []
    train(recipe, say=said.append)
    assert any("bins" in line and ", 4 per step" in line for line in said)


def test_contradictory_settings_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    def refused(**changes: object) -> str:
        with pytest.raises(RecipeError) as error:
            recipe_for(tmp_path, tiny_llama, **changes)
        return str(error.value)

    assert "task.max_length = 128" in refused(train__max_tokens_per_batch=100)
    assert "group_by_length" in refused(
        train__max_tokens_per_batch=256, train__group_by_length=False
    )
    assert "an encoder task cannot pack rows" in refused(task="glue/sst2", task__packing=True)
