"""The forward pass of a causal model: losses of trained tokens, and packed documents.

Logits are computed only at positions whose loss is needed. Documents packed into one sequence do
not attend to each other: torch's ``varlen_attn`` (on a GPU in half precision) computes attention
within each document only; otherwise transformers builds a block mask from positions that restart.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lorakit.errors import UserError
from lorakit.kernels.linear_cross_entropy import (
    LogitTransform,
    checkpointed_cross_entropy,
    linear_cross_entropy,
    summed_cross_entropy,
)
from lorakit.models.attention import replace_sdpa, restore_sdpa
from lorakit.models.host_masks import host_masks
from lorakit.models.master_weights import base_dtype

#: ``train.kernels``
Kernels = Literal["auto", "torch"]
VARLEN = "lorakit_varlen"
#: Attention options that ``varlen_attn`` does not support.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "alibi_slopes")
#: Configuration keys for attention dropout, which ``varlen_attn`` lacks.
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attn_dropout_prob")


@dataclass(frozen=True)
class CausalParts:
    """A model split before its output layer. ``decoder`` returns hidden states, ``head`` raw
    logits, which ``transform`` scales and caps. Both are None for a model that cannot be split."""

    decoder: nn.Module | None
    head: nn.Module | None
    transform: LogitTransform


def split_model(model: PreTrainedModel) -> CausalParts:
    """Split off the output layer, and verify the result against the model's logits of a few
    tokens."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # It warns of padding without a mask, and waits for the device to look for it.
            module.warn_if_padding_and_no_attention_mask = _without_warning  # type: ignore[method-assign]
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
    loss_indices: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    kernels: Kernels = "torch",
    weights: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """The summed cross-entropy of the trained tokens, a float32 scalar: ``final_states``, then
    ``state_losses``."""
    states = final_states(model, parts, input_ids, **inputs)
    return state_losses(
        model, parts, states, loss_indices, targets, label_smoothing, kernels, weights
    )


def final_states(
    model: PreTrainedModel, parts: CausalParts, input_ids: Tensor, **inputs: Any
) -> Tensor:
    """The hidden states (batch, length, hidden) before the output layer, or the logits of a model
    that cannot be split.

    ``input_ids`` (batch, length) is padded on the right. ``inputs`` are additional arguments of the
    decoder: the positions of packed documents. There is no attention mask: with causal attention no
    token sees the padding after it, and without a mask attention takes its fastest path and never
    waits for the device.
    """
    states: Tensor
    if parts.head is None or parts.decoder is None:
        states = model(input_ids=input_ids, use_cache=False, **inputs).logits
    else:
        states = parts.decoder(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        states = _as_input(states, parts.head)
    return states


def _as_input(states: Tensor, head: nn.Module) -> Tensor:
    """Half-precision models with residuals in float32, such as Mamba, cast them for the head."""
    dtype = getattr(getattr(head, "weight", None), "dtype", states.dtype)
    is_wider = states.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)
    return states.to(dtype) if is_wider else states


def state_losses(
    model: PreTrainedModel,
    parts: CausalParts,
    states: Tensor,
    loss_indices: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    kernels: Kernels = "torch",
    weights: Tensor | None = None,
) -> Tensor:
    """The summed cross-entropy of the trained tokens, given the ``final_states``.

    ``loss_indices`` (n,) are positions in the flattened (batch * length) tokens whose next token is
    trained, ``targets`` (n,) those tokens, ``weights`` (n,) what their losses are multiplied by.
    With ``kernels: auto``, a Triton kernel computes the loss on a GPU in half precision.
    """
    hidden = states.reshape(-1, states.shape[-1]).index_select(0, loss_indices)
    head = parts.head
    if head is None:
        return summed_cross_entropy(hidden.float(), targets, label_smoothing, weights)
    trains = any(parameter.requires_grad for parameter in head.parameters())
    if type(head) is nn.Linear and not trains and not head._forward_pre_hooks:
        return linear_cross_entropy(
            hidden,
            head.weight,
            head.bias,
            targets,
            label_smoothing,
            parts.transform,
            fused=kernels == "auto" and uses_fused_loss(hidden),
            row_weights=weights,
        )
    return checkpointed_cross_entropy(
        lambda rows: parts.transform(head(rows)),
        hidden,
        targets,
        vocab=int(model.config.get_text_config().vocab_size),
        label_smoothing=label_smoothing,
        row_weights=weights,
    )


def uses_fused_loss(hidden: Tensor) -> bool:
    """Whether the Triton kernel computes the loss of ``hidden``; on ``meta``, of a GPU."""
    return hidden.device.type in ("cuda", "meta") and hidden.dtype != torch.float32


def _transform(model: PreTrainedModel) -> LogitTransform:
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(scale / divisor, getattr(config, "final_logit_softcapping", None))


def _without_warning(*_: Tensor | None) -> None:
    """Padding on the right needs no mask: see ``final_states``."""


@torch.no_grad()
def _agrees(model: PreTrainedModel, parts: CausalParts) -> bool:
    assert parts.decoder is not None
    assert parts.head is not None
    device = next(model.parameters()).device
    if device.type == "meta":
        return True  # there are no values to compare
    ids = torch.arange(8, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = parts.decoder(input_ids=ids, use_cache=False).last_hidden_state
        logits = parts.transform(parts.head(_as_input(hidden, parts.head)).float())
    finally:
        model.train(was_training)
    exact = base_dtype(model) == torch.float32
    rtol, atol = (1e-4, 1e-4) if exact else (2e-2, 5e-2)
    return torch.allclose(expected, logits, rtol=rtol, atol=atol)


def varlen_options(cu_seq_lens: Tensor, longest: int) -> dict[str, Any]:
    """Model inputs for ``varlen_attention``, under transformers' names. ``cu_seq_lens`` (documents
    + 1,) are int32 offsets of the documents, ``longest`` the tokens of the longest one."""
    return {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention within each document of one sequence; ``query`` is (1, heads, tokens, head_dim).
    Without ``cu_seq_lens_q``, as in evaluations, this is plain ``sdpa``."""
    offsets = options.get("cu_seq_lens_q")
    if offsets is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return out, None
    from torch.nn.attention.varlen import varlen_attn

    unsupported = [name for name in _UNSUPPORTED if options.get(name) is not None]
    if unsupported:
        raise NotImplementedError(f"varlen_attn does not support {', '.join(unsupported)}")
    assert not dropout, "use_varlen refuses models with attention dropout"
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    if repeats > 1:
        k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
    window = options.get("sliding_window")
    longest = options["max_length_q"]
    attention: Any = varlen_attn
    out = attention(
        *(q, k, v, offsets, offsets, longest, longest),
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),
    )
    return out.unsqueeze(0), None


def use_varlen(model: PreTrainedModel) -> bool:
    """Switch the model to ``varlen_attn`` if the device, the dtype, torch and the model's attention
    support it and it isolates documents; return whether it was switched."""
    device = next(model.parameters()).device
    if device.type not in ("cuda", "meta") or not _has_varlen():
        return False
    text_config = model.config.get_text_config()
    if any(getattr(text_config, name, 0.0) for name in _DROPOUTS):
        return False
    if not replace_sdpa(model, VARLEN, varlen_attention):
        return False
    try:
        if _isolates(model, varlen=True):
            return True
    except Exception:  # the model may raise anything; the block mask still works
        pass
    restore_sdpa(model)
    return False


def check_packable(model: PreTrainedModel) -> None:
    """Raise UserError if packed documents see each other or positions do not restart: models with
    a recurrent state, and those without position ids."""
    try:
        isolated = _isolates(model, varlen=False)
    except TypeError:
        isolated = False
    if not isolated:
        raise UserError(
            "task.packing = true: this model's attention does not isolate packed documents; "
            "allowed: false"
        )


def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters)


@torch.no_grad()
def _isolates(model: PreTrainedModel, varlen: bool) -> bool:
    """Whether the hidden states of a document are bitwise equal after two different documents, and
    close to those of the document alone."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return True  # there are no values to compare
    vocabulary = int(model.config.get_text_config().vocab_size)
    first, other = (torch.arange(8) * step % vocabulary for step in (3, 5))
    second = torch.arange(16) * 7 % vocabulary
    was_training = model.training
    model.eval()
    try:
        with host_masks(device, packed=not varlen):
            after_first, after_other = (
                _hidden(model, torch.cat([before, second]), 8, varlen) for before in (first, other)
            )
            alone = _hidden(model, second, 0, False)
    finally:
        model.train(was_training)
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    limit = tolerance * float(alone.abs().max())
    close = torch.allclose(after_first[8:], alone, rtol=tolerance, atol=limit)
    return torch.equal(after_first[8:], after_other[8:]) and close


def _hidden(model: PreTrainedModel, ids: Tensor, boundary: int, varlen: bool) -> Tensor:
    """The last hidden states (tokens, hidden), in float32, of two documents split at
    ``boundary``."""
    device = next(model.parameters()).device
    length = len(ids)
    positions = torch.cat([torch.arange(boundary), torch.arange(length - boundary)])
    offsets = torch.tensor([0, boundary, length], dtype=torch.int32, device=device)
    inputs = {"input_ids": ids[None].to(device), "position_ids": positions[None].to(device)}
    options = varlen_options(offsets, length) if varlen else {}
    decoder: Any = model.get_decoder()
    out = decoder(**inputs, **options, use_cache=False)
    hidden: Tensor = out.last_hidden_state[0].float()
    return hidden
