"""Two answers about attention masks that transformers asks the device for, given from the host.

To choose the fastest attention, transformers looks whether a mask hides anything and whether
positions restart within a row. Both read a tensor's value, so that every forward pass waits for
the device. Here both are known beforehand: a caller says whether its rows are packed, and an
encoder's mask is only passed where something is padded.

A causal model in two parts, so that logits are made only where a label is trained.

Several documents in one sequence that do not see each other.

Two ways. With ``varlen_attn`` of torch (a GPU, half precision) no pair of tokens of two documents
is ever computed. Elsewhere transformers makes a block mask from positions that restart.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorakit.errors import UserError
from lorakit.kernels.linear_cross_entropy import (
    LogitTransform,
    checkpointed_cross_entropy,
    linear_cross_entropy,
)
from lorakit.models.master_weights import base_dtype

_PACKED = "find_packed_sequence_indices"
_HIDES_NOTHING = "_ignore_bidirectional_mask_sdpa"


@contextmanager
def host_masks(device: torch.device, packed: bool = False) -> Iterator[None]:
    """Run a forward pass without those two waits; on the CPU, where nothing waits, as it is.
    ``packed``: positions restart within a row, and transformers shall make the mask for that.

    A version of transformers without these functions runs as it is too: slower, not wrong.
    """
    own: dict[str, Any] = {_HIDES_NOTHING: _only_without_mask}
    if not packed:
        own[_PACKED] = _never_packed
    before = {name: getattr(masking_utils, name, None) for name in own}
    if device.type == "cpu" or None in before.values():
        yield
        return
    try:
        for name, answer in own.items():
            setattr(masking_utils, name, answer)
        yield
    finally:
        for name, original in before.items():
            setattr(masking_utils, name, original)


def _never_packed(position_ids: Any) -> None:
    return None


def _only_without_mask(
    padding_mask: Any, kv_length: int, local_attention_size: int | None = None
) -> bool:
    local = local_attention_size is not None and kv_length >= local_attention_size
    return padding_mask is None and not local


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
    loss_indices: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    **inputs: Any,
) -> Tensor:
    """Return the sum of the losses of the trained tokens, a float32 scalar.

    ``input_ids`` (batch, length) is padded on the right; ``loss_indices`` (n,) are positions in the
    flattened (batch * length) sequence, ``targets`` (n,) the tokens that follow them. No attention
    mask is passed: under causal attention no token sees the padding behind it, and without a mask
    attention takes its fastest path and never waits for the device. ``inputs`` are further
    arguments of the decoder, such as the ``position_ids`` of packed rows.
    """
    if parts.head is None or parts.decoder is None:
        logits = model(input_ids=input_ids, use_cache=False, **inputs).logits
        rows = logits.reshape(-1, logits.shape[-1]).index_select(0, loss_indices).float()
        return nn.functional.cross_entropy(
            rows, targets, reduction="sum", label_smoothing=label_smoothing
        )
    hidden = parts.decoder(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
    hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, loss_indices)
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


VARLEN = "lorakit_varlen"
#: Attention of which nothing is said to ``varlen_attn``.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "alibi_slopes")
#: How configurations name the dropout of attention, which ``varlen_attn`` has not.
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attn_dropout_prob")


def varlen_options(cu_seq_lens: Tensor, longest: int) -> dict[str, Any]:
    """What a model hands on to its attention: the names are those of transformers."""
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
    """Attention of documents in one sequence, query (1, heads, tokens, head_dim); without
    ``cu_seq_lens_q``, as in an evaluation, plain ``sdpa``."""
    starts = options.get("cu_seq_lens_q")
    if starts is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return out, None
    from torch.nn.attention.varlen import varlen_attn

    unknown = [name for name in _UNKNOWN if options.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"varlen_attn has no {', '.join(unknown)}")
    assert not dropout, "use_varlen looks for it"
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    if repeats > 1:
        k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
    window = options.get("sliding_window")
    longest = options["max_length_q"]
    attention: Any = varlen_attn
    out = attention(
        *(q, k, v, starts, starts, longest, longest),
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),
    )
    return out.unsqueeze(0), None


def use_varlen(model: PreTrainedModel) -> bool:
    """Let the model attend through ``varlen_attn``, if device, precision, torch and the model's
    attention allow it and the model then keeps documents apart."""
    device = next(model.parameters()).device
    half = model.dtype in (torch.bfloat16, torch.float16)
    own: str | None = model.config._attn_implementation
    if device.type != "cuda" or not half or own != "sdpa" or not _has_varlen():
        return False
    text_config = model.config.get_text_config()
    if any(getattr(text_config, name, 0.0) for name in _DROPOUTS):
        return False
    ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(VARLEN, sdpa_mask)
    try:
        model.set_attn_implementation(VARLEN)
        if model.config._attn_implementation == VARLEN and _keeps_apart(model, varlen=True):
            return True
    except Exception:  # a model may refuse in any way, and the block mask is the other way
        pass
    model.set_attn_implementation(own)
    return False


def check_packable(model: PreTrainedModel) -> None:
    """Raise UserError if documents in one sequence see each other, or positions do not restart:
    models with a state that runs through the sequence, and those that take no positions."""
    try:
        apart = _keeps_apart(model, varlen=False)
    except TypeError:
        apart = False
    if not apart:
        raise UserError(
            "task.packing = true: this model's attention does not keep packed rows apart; "
            "allowed: false"
        )


def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters)


@torch.no_grad()
def _keeps_apart(model: PreTrainedModel, varlen: bool) -> bool:
    """Whether of two documents the second one's hidden states are to the bit the same with another
    first one, and nearly those that it has alone."""
    device = next(model.parameters()).device
    vocabulary = int(model.config.get_text_config().vocab_size)
    first, other = (torch.arange(8) * step % vocabulary for step in (3, 5))
    second = torch.arange(16) * 7 % vocabulary
    was_training = model.training
    model.eval()
    try:
        with host_masks(device, packed=not varlen):
            one, two = (
                _hidden(model, torch.cat([before, second]), 8, varlen) for before in (first, other)
            )
            alone = _hidden(model, second, 0, False)
    finally:
        model.train(was_training)
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    near = torch.allclose(one[8:], alone, rtol=tolerance, atol=tolerance * float(alone.abs().max()))
    return torch.equal(one[8:], two[8:]) and near


def _hidden(model: PreTrainedModel, ids: Tensor, boundary: int, varlen: bool) -> Tensor:
    """The last hidden states (tokens, hidden), in float32, of documents 0 to boundary and on."""
    device = next(model.parameters()).device
    length = len(ids)
    positions = torch.cat([torch.arange(boundary), torch.arange(length - boundary)])
    starts = torch.tensor([0, boundary, length], dtype=torch.int32, device=device)
    inputs = {"input_ids": ids[None].to(device), "position_ids": positions[None].to(device)}
    options = varlen_options(starts, length) if varlen else {}
    decoder: Any = model.get_decoder()
    out = decoder(**inputs, **options, use_cache=False)
    hidden: Tensor = out.last_hidden_state[0].float()
    return hidden
