"""``per_device_batch_size: auto``: the search, its trials, and runs that continue with its choice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.data.encode import EncodedSplit
from lorakit.distributed.build import build_strategy
from lorakit.errors import UserError
from lorakit.training.batch_size import BatchTrial, batch_sizes, largest_that_fits, powers_of_two
from lorakit.training.batching import split_step
from tests.training.engines import built
from tests.training.runs import adapter_bytes, changed, recipe_for, run_json

AUTO = {"train__per_device_batch_size": "auto", "train__rows_per_step": 8}


def memory_for(limit: int) -> Callable[[int], int]:
    """A trial on a device that has memory for this many rows, of 100 bytes each."""

    def trial(size: int) -> int:
        if size > limit:
            raise torch.OutOfMemoryError(f"{size} rows")
        return 100 * size

    return trial


@pytest.mark.parametrize("rows", [1, 24, 64])
def test_the_largest_size_that_fits(rows: int) -> None:
    sizes = batch_sizes(rows, 1)
    assert largest_that_fits(sizes, memory_for(0)) is None
    for limit in range(1, rows + 2):
        found = largest_that_fits(sizes, memory_for(limit))
        assert found is not None
        assert found.per_device_batch_size == max(size for size in sizes if size <= limit)
        assert found.peak_memory_bytes == 100 * found.per_device_batch_size
        assert len(found.tried) == len(set(found.tried)) <= 5


def test_all_rows_at_once_are_tried_first() -> None:
    found = largest_that_fits(batch_sizes(24, 1), memory_for(1000))
    assert found is not None
    assert found.tried == [24]


def test_another_error_of_a_trial_is_not_hidden() -> None:
    def trial(size: int) -> int:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        largest_that_fits([1, 2], trial)


def test_processes_share_a_step_equally() -> None:
    assert batch_sizes(24, 2) == [1, 2, 3, 4, 6, 12]
    with pytest.raises(UserError, match=r"rows_per_step = 30: 4 processes .* a multiple of 4"):
        batch_sizes(30, 4)


def test_powers_of_two() -> None:
    assert [powers_of_two(limit) for limit in (0, 1, 7, 8)] == [[1], [1], [1, 2, 4], [1, 2, 4, 8]]
    assert powers_of_two(10**6)[-1] == 512


def test_without_rows_per_step_the_batches_of_a_step_remain(
    tiny_llama: Path, tmp_path: Path
) -> None:
    changes = {"train__per_device_batch_size": "auto", "train__gradient_accumulation_steps": 3}
    run = built(recipe_for(tmp_path, tiny_llama, **changes))
    section = run.prepared.recipe.train
    assert isinstance(run.prepared.train, EncodedSplit)
    largest = max(size for size in (1, 2, 4, 8, 16, 32) if 3 * size <= len(run.prepared.train))
    assert (section.per_device_batch_size, section.gradient_accumulation_steps) == (largest, 3)
    assert [text for text in run.said if f"(of {largest} tried), 3 batches per step" in text]


def test_a_step_keeps_its_rows(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = split_step(recipe_for(tmp_path, tiny_llama, **AUTO), 2, 2)
    section = recipe.train
    assert (section.per_device_batch_size, section.gradient_accumulation_steps) == (2, 2)
    assert section.rows_per_step is None


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter__lora_dropout": 0.3},
        {"task__packing": True},
        {"train__gradient_checkpointing": True, "train__optimizer": "sgd"},
    ],
)
def test_trials_do_not_affect_the_run(
    changes: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    numbers = recipe_for(tmp_path, tiny_llama, **changes)
    run = built(changed(numbers, **AUTO))
    assert [text for text in run.said if "the largest that fits (of 8 tried), 1 " in text]
    losses = [float(result.loss) for result in run.take_steps(4)]
    plain = built(numbers)
    assert run.prepared.recipe == plain.prepared.recipe
    assert losses == [float(result.loss) for result in plain.take_steps(4)]
    for name, weight in run.engine.weights.items():
        assert torch.equal(weight, plain.engine.weights[name]), name


def test_a_trial_has_the_longest_rows_and_restores_modules(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, tiny_llama)
    run = built(recipe)
    seen: list[torch.Size] = []
    run.objective.register_forward_pre_hook(lambda _, batch: seen.append(batch[0].input_ids.shape))
    run.objective.eval()
    prepared = replace(run.prepared, recipe=changed(run.prepared.recipe, **AUTO))
    trial = BatchTrial(prepared, run.objective, build_strategy(recipe.model.dtype))
    assert trial(5) > 0
    assert isinstance(prepared.train, EncodedSplit)
    assert seen == [(5, prepared.train.lengths.max())]
    assert not any(module.training for module in run.objective.modules())
    assert all(parameter.grad is None for parameter in run.objective.parameters())


def test_a_resumed_run_takes_the_size_of_its_start(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(
        tmp_path, tiny_llama, train__per_device_batch_size=4, train__save_every_steps=3,
        train__gradient_accumulation_steps=2,
    )  # fmt: skip
    run = lorakit.train(recipe).output_dir
    wanted = adapter_bytes(run)
    shutil.rmtree(run / "checkpoints" / "step-8")
    shutil.rmtree(run / "adapter")
    automatic = changed(recipe, **AUTO, train__gradient_accumulation_steps=1)
    assert lorakit.train(automatic, "auto").steps == 8
    assert adapter_bytes(run) == wanted
    assert run_json(run)["per_device_batch_size"] == 4
    assert lorakit.load_recipe(run / "recipe.yaml") == recipe
    other = changed(automatic, train__rows_per_step=12)
    (run / "run.json").unlink()
    with pytest.raises(UserError, match="rows per step differ"):
        lorakit.train(other, "auto")


def test_the_cpu_needs_a_number(tiny_llama: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    recipe = recipe_for(tmp_path, tiny_llama, **AUTO)
    with pytest.raises(UserError, match=r'^train\.per_device_batch_size = "auto": needs a GPU: '):
        lorakit.train(recipe)
    assert not (tmp_path / "run").exists()
