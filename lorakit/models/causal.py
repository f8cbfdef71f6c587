"""A causal model in two parts, so that logits are made only where a label is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.kernels.linear_cross_entropy import (
    LogitTransform,
    checkpointed_cross_entropy,
    linear_cross_entropy,
)
from lorakit.models.masters import base_dtype


@dataclass(frozen=True)
class CausalParts:
    """``decoder`` gives hidden states, ``head`` raw logits, ``transform`` what the model does
    to those. ``head`` is None where the split does not give the model's own logits."""

    decoder: nn.Module | None
    head: nn.Module | None
    transform: LogitTransform


def split_model(model: PreTrainedModel) -> CausalParts:
    """The decoder and the output layer, checked on a few tokens against the model's own logits."""
    head = model.get_output_embeddings()
    decoder = model.get_decoder()
    parts = CausalParts(decoder, head, _transform(model))
    if head is None or decoder is None or decoder is model or not _agrees(model, parts):
        return CausalParts(None, None, LogitTransform())
    return parts


def token_losses(
    model: PreTrainedModel,
    parts: CausalParts,
    input_ids: Tensor,
    positions: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    **inputs: Any,
) -> Tensor:
    """The sum of the losses of the trained tokens, a float32 scalar.

    input_ids (batch, length) padded on the right; positions (n,) index the flattened (batch *
    length) rows whose next token is trained, targets (n,) are those tokens. There is no attention
    mask: under causal attention no token sees the padding behind it, and without a mask attention
    takes its fastest path and never waits for the device. ``inputs`` are what else the decoder
    gets: where packed rows begin.
    """
    if parts.head is None or parts.decoder is None:
        logits = model(input_ids=input_ids, use_cache=False, **inputs).logits
        rows = logits.reshape(-1, logits.shape[-1]).index_select(0, positions).float()
        return nn.functional.cross_entropy(
            rows, targets, reduction="sum", label_smoothing=label_smoothing
        )
    hidden = parts.decoder(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
    hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
    head = parts.head
    trains = any(parameter.requires_grad for parameter in head.parameters())
    if type(head) is nn.Linear and not trains and not head._forward_pre_hooks:
        return linear_cross_entropy(
            hidden, head.weight, head.bias, targets, label_smoothing, parts.transform
        )
    return checkpointed_cross_entropy(
        lambda rows: parts.transform(head(rows)),
        hidden,
        targets,
        vocab=int(model.config.get_text_config().vocab_size),
        label_smoothing=label_smoothing,
    )


def _transform(model: PreTrainedModel) -> LogitTransform:
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(scale / divisor, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _agrees(model: PreTrainedModel, parts: CausalParts) -> bool:
    assert parts.decoder is not None
    assert parts.head is not None
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    try:
        want = model(input_ids=ids, use_cache=False).logits.float()
        hidden = parts.decoder(input_ids=ids, use_cache=False).last_hidden_state
        got = parts.transform(parts.head(hidden).float())
    finally:
        model.train(was_training)
    exact = base_dtype(model) == torch.float32
    return torch.allclose(want, got, rtol=1e-4 if exact else 2e-2, atol=1e-4 if exact else 5e-2)
