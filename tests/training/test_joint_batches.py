"""Joint batches padded to few shapes, with the losses of the members' own batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lorakit.data.collate import collate_causal, collate_encoder
from lorakit.data.encode import EncodedRow
from lorakit.training.engine.eager import CausalObjective, EncoderObjective
from lorakit.training.joint.batches import Joiner
from tests.families import tiny


def rows(count: int, length: int, seed: int, kind: str) -> list[EncodedRow]:
    """Rows whose second half is trained; the longest has ``length`` tokens."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(count):
        ids = draw.integers(5, 60, max(2, length - 2 * i)).astype(np.int32)
        mask = np.arange(len(ids)) >= len(ids) // 2
        found.append(EncodedRow(ids, mask, None, i % 2 if kind == "bert" else None))
    return found


def batch(count: int, length: int, seed: int, kind: str) -> Any:
    collate = collate_encoder if kind == "bert" else collate_causal
    return collate(rows(count, length, seed, kind), 0)


def objective_of(kind: str) -> Any:
    """That of a model which is frozen, but for one layer."""
    if kind == "bert":
        return EncoderObjective(tiny("bert", vocab_size=64, num_labels=2).eval())
    model = tiny("llama", vocab_size=64).requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    return CausalObjective(model)


def gradients(objective: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
    objective.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_padding_to_few_shapes_keeps_the_losses(kind: str) -> None:
    batches = [batch(4, 35, 0, kind), batch(3, 50, 1, kind)]
    objective = objective_of(kind)
    alone = [objective.losses(objective.states(own), own) for own in batches]
    torch.stack(alone).sum().backward()
    wanted = gradients(objective)
    joint = Joiner(0, 1, longest=128).join(batches, [1.0, 1.0])
    assert joint.batch.input_ids.shape == (8, 64)
    states = objective.states(joint.batch)
    losses = [objective.losses(joint.states(states, place), joint.own(place)) for place in (0, 1)]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(losses, alone)
    for found, reference in zip(gradients(objective), wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)


def test_joint_passes_have_few_shapes() -> None:
    """Up to 128 tokens there are six lengths, and two numbers of trained tokens."""
    joiner = Joiner(0, 1, longest=128)
    joints = [
        joiner.join([batch(4, length, 0, "llama"), batch(4, length - 8, 1, "llama")], [1.0, 1.0])
        for length in range(10, 129)
    ]
    assert {joint.batch.input_ids.shape[1] for joint in joints} == {16, 32, 48, 64, 96, 128}
    assert {joint.losses["targets"].shape[1] for joint in joints} == {128, 256}
