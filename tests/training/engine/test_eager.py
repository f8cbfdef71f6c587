"""The contract of an engine, kept by the reference."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.training.engines import Built, built
from tests.training.runs import recipe_for


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Built:
    return built(
        recipe_for(
            tmp_path, tiny_llama, train__gradient_accumulation_steps=2, train__warmup_steps=0
        )
    )


def test_a_restored_state_continues_exactly(run: Built) -> None:
    run.take_steps(2)
    state = copy.deepcopy(run.engine.state_dict())
    results = run.take_steps(2)
    restored = built(run.prepared.recipe)
    restored.engine.load_state_dict(state)
    again = restored.take_steps(2)
    assert [r.loss.item() for r in again] == [r.loss.item() for r in results]
    assert [r.grad_norm.item() for r in again] == [r.grad_norm.item() for r in results]
    assert restored.engine.log_values() == run.engine.log_values()
    for name, weight in run.engine.weights.items():
        assert torch.equal(restored.engine.weights[name], weight), name


def test_measuring_the_loss_changes_nothing(run: Built) -> None:
    engine, batches = run.engine, run.loader.take(0).micro_batches
    assert len(batches) == 2
    before = {name: weight.clone() for name, weight in engine.weights.items()}
    loss = engine.loss(batches)
    assert all(torch.equal(engine.weights[name], weight) for name, weight in before.items())
    assert all(parameter.grad is None for parameter in engine.parameters.values())
    assert engine.objective.training
    assert engine.step(batches).loss.item() == pytest.approx(loss, abs=1e-6)
    assert any(not torch.equal(engine.weights[name], weight) for name, weight in before.items())


def test_a_step_counts_the_losses_of_all_its_batches(run: Built) -> None:
    loaded = run.loader.take(0)
    result = run.engine.step(loaded.micro_batches)
    assert result.loss_count == sum(len(batch.targets) for batch in loaded.micro_batches)
    assert loaded.token_count > result.loss_count
    assert run.engine.log_values().keys() == {"learning_rate"}
    assert run.engine.is_final_form()
    assert run.engine.ranks() is None


def test_loaded_weights_replace_the_trained_ones(run: Built) -> None:
    first = {name: weight.clone() for name, weight in run.engine.weights.items()}
    run.take_steps(1)
    run.engine.load_weights(first)
    assert all(torch.equal(run.engine.weights[name], weight) for name, weight in first.items())
