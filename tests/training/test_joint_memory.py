"""How many members the memory holds, and what happens if it holds fewer."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorakit.errors import TrainingError
from lorakit.recipe.sections import Recipe
from lorakit.training.joint import members_that_fit
from lorakit.training.joint.memory import base_bytes, empty_base, member_bytes, trained_parameters
from lorakit.training.session import RunResult
from tests.training.engines import built
from tests.training.joint_runs import assert_equal_runs, members, train_alone, train_together


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Recipe:
    [found] = members(tmp_path, tiny_llama, "completion", [{}])
    return found


def test_the_base_counts_once(recipe: Recipe) -> None:
    model = empty_base(recipe)
    weights = sum(p.numel() for p in built(recipe).prepared.model.parameters())
    adapter = sum(p.numel() for p in built(recipe).engine.parameters.values())
    assert base_bytes(recipe, model) == 4 * (weights - adapter)


def test_a_member_adds_its_adapter_and_its_rows(tiny_llama: Path, tmp_path: Path) -> None:
    changes = [
        {}, {"adapter__r": 8}, {"train__per_device_batch_size": 16},
        {"train__gradient_checkpointing": True},
    ]  # fmt: skip
    recipes = members(tmp_path, tiny_llama, "completion", changes)
    model = empty_base(recipes[0])
    plain, ranks, rows, spared = (
        member_bytes(recipe, model, trained_parameters(recipe, model)) for recipe in recipes
    )
    parameters = sum(p.numel() for p in built(recipes[0]).engine.parameters.values())
    assert ranks - plain == 16 * parameters
    assert plain < rows < 2 * plain
    assert spared < plain


def test_the_estimate_covers_what_autograd_keeps(recipe: Recipe) -> None:
    """And is not far above it."""
    run = built(recipe)
    longest = max(range(len(run.prepared.train)), key=lambda i: run.prepared.train.lengths[i])
    batch = run.loader.collate([[run.prepared.train[longest]]] * 8)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in run.prepared.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run.objective(batch)
    found = sum(size for pointer, size in kept.items() if pointer not in weights)
    del loss
    tokens = batch.input_ids.shape[1] / recipe.task.max_length
    estimate = member_bytes(recipe, empty_base(recipe), trained=0) * tokens
    assert found < 1.1 * estimate
    assert estimate < 3 * found


def test_at_least_one_member_fits(tiny_llama: Path, tmp_path: Path) -> None:
    common = {"train__per_device_batch_size": 10**9}
    recipes = members(tmp_path, tiny_llama, "completion", [{}, {}], **common)
    assert members_that_fit(recipes, torch.device("cpu")) == 1
    small = members(tmp_path, tiny_llama, "completion", [{}, {}])
    assert members_that_fit(small, torch.device("cpu")) == 2


class Memory:
    """A device that has room for the activations of ``rows`` rows in the last layer, in training or
    in evaluations."""

    def __init__(self, rows: int, in_training: bool = True) -> None:
        self.rows, self.in_training = rows, in_training
        self.failed: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not (isinstance(module, LlamaRMSNorm) and module.training == self.in_training):
            return
        assert not any(activation() is not None for activation in self.failed)
        if len(args[0]) > self.rows and args[0].requires_grad == self.in_training:
            self.failed.append(weakref.ref(args[0]))
            raise torch.OutOfMemoryError("no memory left")


TWO = "out of memory: training at most 2 members together from now on"
ONE = "out of memory: training members one after another from now on"


@pytest.mark.parametrize(("rows", "notes"), [(8, [TWO]), (4, [TWO, ONE])])
def test_a_pass_that_does_not_fit_is_split(
    tiny_llama: Path, tmp_path: Path, rows: int, notes: list[str]
) -> None:
    """Its activations are freed before the members' parts of it are computed."""
    changes = [{"train__learning_rate": 1e-3 * (1 + index)} for index in range(4)]
    recipes = members(tmp_path, tiny_llama, "completion", changes, train__per_device_batch_size=4)
    said: list[str] = []
    memory = Memory(rows)
    handle = register_module_forward_pre_hook(memory)
    try:
        results = train_together(recipes, say=said.append)
    finally:
        handle.remove()
    assert memory.failed
    assert [line for line in said if line.startswith("out of memory")] == notes
    for recipe, result in zip(recipes, results, strict=True):
        assert isinstance(result, RunResult), result
        assert_equal_runs(result.output_dir, train_alone(recipe))


@pytest.mark.parametrize(("rows", "notes"), [(8, [TWO]), (4, [TWO, ONE])])
def test_an_evaluation_that_does_not_fit_is_split(
    tiny_llama: Path, tmp_path: Path, rows: int, notes: list[str]
) -> None:
    changes = [{"train__learning_rate": 1e-3 * (1 + index)} for index in range(4)]
    recipes = members(
        tmp_path, tiny_llama, "completion", changes, train__per_device_eval_batch_size=4,
        task__generation_batch_size=4,
    )  # fmt: skip
    said: list[str] = []
    handle = register_module_forward_pre_hook(Memory(rows, in_training=False))
    try:
        results = train_together(recipes, say=said.append)
    finally:
        handle.remove()
    found = [line.replace("evaluating", "training") for line in said if "out of memory" in line]
    assert found == notes
    for recipe, result in zip(recipes, results, strict=True):
        assert isinstance(result, RunResult), result
        assert_equal_runs(result.output_dir, train_alone(recipe))


def test_members_are_evaluated_at_the_same_time_although_passes_become_smaller(
    tiny_llama: Path, tmp_path: Path
) -> None:
    changes = [{"train__learning_rate": 1e-3 * (1 + index)} for index in range(8)]
    recipes = members(
        tmp_path, tiny_llama, "completion", changes, train__per_device_batch_size=4,
        train__eval_every_steps=1, train__max_steps=4, train__epochs=None,
    )  # fmt: skip
    memory = Memory(16)
    asked: list[tuple[int, int]] = []

    def stop_at(index: int, step: int, metrics: dict[str, float] | None) -> bool:
        asked.append((step, index))
        if step == 2:
            memory.rows = 8
        return False

    handle = register_module_forward_pre_hook(memory)
    try:
        train_together(recipes, stop_at=stop_at)
    finally:
        handle.remove()
    assert len(memory.failed) == 2
    assert asked == [(step, index) for step in (1, 2, 3) for index in range(8)]


def test_a_member_that_does_not_fit_frees_its_memory(tiny_llama: Path, tmp_path: Path) -> None:
    """Although its error is kept while the others train."""
    sizes = [{"train__per_device_batch_size": size} for size in (8, 2)]
    recipes = members(tmp_path, tiny_llama, "completion", sizes)
    memory = Memory(2)
    handle = register_module_forward_pre_hook(memory)
    try:
        results = train_together(recipes)
    finally:
        handle.remove()
    assert isinstance(results[0], TrainingError)
    assert isinstance(results[1], RunResult)
    assert len(memory.failed) > 1
