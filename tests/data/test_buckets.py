"""Batches padded to buckets: few shapes, little padding, and the same losses and gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lorakit.data.buckets import bucket, pad_to_bucket
from lorakit.data.collate import Batch, collate_causal, collate_encoder
from lorakit.data.encode import EncodedRow
from lorakit.training.engine.eager import CausalObjective, EncoderObjective
from tests.families import tiny


def rows(count: int, labels: bool) -> list[EncodedRow]:
    draw = np.random.default_rng(0)
    found = []
    for i in range(count):
        ids = draw.integers(5, 60, 3 + 3 * i).astype(np.int32)
        mask = draw.random(len(ids)) < 0.5
        mask[-1] = True
        found.append(EncodedRow(ids, mask, None, i % 2 if labels else None))
    return found


def loss_and_gradients(objective: nn.Module, batch: Batch) -> list[torch.Tensor]:
    objective.zero_grad()
    loss = objective(batch)
    loss.backward()
    gradients = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("per_octave", [2, 4])
def test_buckets_are_few_and_close(per_octave: int) -> None:
    sizes = range(1, 4097)
    found = [bucket(size, per_octave, 8) for size in sizes]
    assert all(size <= padded < size + max(8, size / per_octave) for size, padded in zip(sizes, found, strict=True))  # fmt: skip
    assert found == sorted(found)
    assert len(set(found)) <= 12 * per_octave
    assert all(bucket(padded, per_octave, 8) == padded for padded in found)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("head", ["chunked", "whole"])
def test_a_causal_batch_keeps_its_losses(head: str, weighted: bool) -> None:
    model = tiny("llama", vocab_size=64)
    if head == "chunked":
        model.requires_grad_(False)
        for parameter in model.model.layers[0].parameters():
            parameter.requires_grad_()
    given = rows(5, labels=False)
    if weighted:
        given = [replace(r, loss_weights=r.loss_mask * np.float32(0.5 + i))
                 for i, r in enumerate(given)]  # fmt: skip
    batch = collate_causal(given, 0)
    padded = pad_to_bucket(batch, 0, longest=128)
    assert padded.input_ids.shape == (5, 16)
    assert len(padded.tensors()["targets"]) == 64
    assert padded.loss_count == batch.loss_count
    objective = CausalObjective(model)
    wanted = loss_and_gradients(objective, batch)
    for found, reference in zip(loss_and_gradients(objective, padded), wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-6)


def test_an_encoder_batch_keeps_its_losses() -> None:
    model = tiny("bert", vocab_size=64, num_labels=2)
    batch = collate_encoder(rows(5, labels=True), 0)
    padded = pad_to_bucket(batch, 0, longest=128)
    assert padded.input_ids.shape == (5, 16)
    objective = EncoderObjective(model.eval())
    wanted = loss_and_gradients(objective, batch)
    for found, reference in zip(loss_and_gradients(objective, padded), wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-6)


def test_no_batch_gets_longer_than_the_longest_row_may_be() -> None:
    batch = collate_causal(rows(7, labels=False), 0)
    assert batch.input_ids.shape[1] == 21
    assert pad_to_bucket(batch, 0, longest=22).input_ids.shape[1] == 22
    assert pad_to_bucket(batch, 0, longest=20).input_ids.shape[1] == 21
