"""What a pass keeps on the ``meta`` device equals what real tensors keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

import lorakit
from lorakit.data.collate import CausalBatch, EncoderBatch
from lorakit.models.host_masks import host_masks
from lorakit.planning.attention import planned_attention
from lorakit.planning.operators import FLOPS, TEMPORARIES
from lorakit.planning.tracker import MemoryTracker, storage_bytes
from lorakit.training.engine.eager import CausalObjective, EncoderObjective
from tests.families import CAUSAL, ENCODERS, tiny

ROWS, TOKENS = 3, 24
META = torch.device("meta")


def batch(encoder: bool) -> Any:
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 60 + 2
    if encoder:
        mask = torch.ones_like(ids)
        mask[1, 10:] = 0
        return EncoderBatch(ids, torch.zeros(ROWS, dtype=torch.long), mask)
    indices = torch.arange(0, ROWS * TOKENS, 2)
    return CausalBatch(ids, indices, ids.flatten()[indices])


def adapted(family: str) -> PreTrainedModel:
    model = tiny(family, **({"hidden_size": 64} if family == "bert" else {}))
    lorakit.inject(model, lorakit.LoraConfig(r=4, target_modules=["all-linear"]))
    return model.train()


def kept_really(model: PreTrainedModel, encoder: bool) -> int:
    """The bytes of everything that the backward pass reads, but for the model and the batch."""
    inputs = batch(encoder)
    objective = EncoderObjective(model) if encoder else CausalObjective(model)
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    known |= {t.untyped_storage().data_ptr() for t in inputs.tensors().values()}
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        states = objective.states(inputs)
    alive = [t for t in [*saved, states] if t.untyped_storage().data_ptr() not in known]
    return storage_bytes(alive)


def kept_on_meta(model: PreTrainedModel, encoder: bool) -> int:
    model.to(META)
    objective = EncoderObjective(model) if encoder else CausalObjective(model)
    inputs = batch(encoder).to(META)
    tracker = MemoryTracker(TEMPORARIES, FLOPS)
    tracker.exclude([*model.parameters(), *model.buffers(), *inputs.tensors().values()])
    with host_masks(META), planned_attention("cpu"), tracker:
        states = objective.states(inputs)
        kept = tracker.bytes_in_use
    del states
    return kept


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_activations_equal_those_of_real_tensors(family: str) -> None:
    encoder = family in ENCODERS
    model = adapted(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    wanted = kept_really(model, encoder)
    # The CPU copies the result of attention with partial rotary embeddings, a GPU its mask.
    assert kept_on_meta(model, encoder) == pytest.approx(wanted, rel=0.07)
