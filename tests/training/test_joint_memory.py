"""How many members the memory holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit.recipe.sections import Recipe
from lorakit.training.joint import members_that_fit
from lorakit.training.joint.memory import base_bytes, empty_base, member_bytes, trained_parameters
from tests.training.engines import built
from tests.training.joint_runs import members


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
