"""Attention of half-precision models on the CPU.

torch's backward pass of attention in bfloat16 or float16 takes two to six times as long on a CPU
as the same pass in float32, which is also more precise. With AMX, bfloat16 products by themselves
take half the time of the latter (``_Products``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lorakit.models.attention import replace_sdpa

_NAME = "lorakit_cpu"
#: With more tokens than this, torch's own pass in bfloat16 is as fast: without AMX, and with it.
_LONG_BFLOAT16, _LONG_WITH_AMX = 512, 256


def cpu_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(Q K^T / sqrt(d)) V in the dtype of ``query``, which is (batch, heads, tokens,
    head_dim); the result is (batch, tokens, heads, head_dim). ``options`` are those of
    transformers' ``sdpa``."""
    dtype = query.dtype
    if _takes_products(query, key, value, attention_mask, options):
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        bias = _bias(module, query, attention_mask, options.get("is_causal"))
        products: Tensor = _Products.apply(  # type: ignore[no-untyped-call]
            query, key, value, bias, scaling
        )
        return products.transpose(1, 2).contiguous(), None
    if dtype == torch.float16 or key.shape[2] <= (_LONG_WITH_AMX if _has_amx() else _LONG_BFLOAT16):
        query, key, value = query.float(), key.float(), value.float()
        attention_mask = _in_float32(attention_mask)
        options = {name: _in_float32(option) for name, option in options.items()}
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return out.to(dtype), None


class _Products(torch.autograd.Function):
    """Q K^T and the softmax in float32, all other products in bfloat16, as kernels for GPUs have
    them: gradients are closer to float64's than those of torch's own bfloat16 attention.

    ``bias`` (batch or 1, heads or 1, tokens, tokens) in float32 is added to the scores. Several
    heads of the query may share one of the key and the value.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        batch, heads, tokens, _ = query.shape
        q, k, v = (_by_key_head(tensor, key.shape[1]) for tensor in (query, key, value))
        scores = torch.bmm(q.float() * scaling, k.float().mT).view(batch, heads, tokens, tokens)
        if bias is not None:
            scores += bias
        probabilities = torch.softmax(scores, dim=-1).to(query.dtype).view(len(q), -1, tokens)
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.scaling = scaling
        return torch.bmm(probabilities, v).view(batch, heads, tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probabilities = ctx.saved_tensors
        (d_out,) = grad_outputs
        batch, heads, tokens, _ = d_out.shape
        d_out = _by_key_head(d_out, heads * tokens // q.shape[1])
        d_probabilities = torch.bmm(d_out, v.mT)
        d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, q.dtype)
        d_query = torch.bmm(d_scores, k).mul_(ctx.scaling).view(batch, heads, tokens, -1)
        d_key = torch.bmm(d_scores.mT, q).mul_(ctx.scaling).view(batch, -1, *k.shape[1:])
        d_value = torch.bmm(probabilities.mT, d_out).view(batch, -1, *v.shape[1:])
        return d_query, d_key, d_value, None, None


def _by_key_head(tensor: Tensor, key_heads: int) -> Tensor:
    """(batch, heads, tokens, head_dim) as (batch * key_heads, queries per key * tokens, head_dim):
    the heads that share a key follow one another."""
    return tensor.reshape(len(tensor) * key_heads, -1, tensor.shape[-1])


def _takes_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> bool:
    """Passes without gradients take longer as products than in float32. ``meta`` stands for the
    CPU when memory is planned."""
    tensors = (query, key, value)
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        and all(tensor.dtype == torch.bfloat16 for tensor in tensors)
        and query.device.type in ("cpu", "meta")
        and query.shape[2] == key.shape[2] <= _LONG_WITH_AMX
        and len(query) == len(key)
        and key.shape[1] == value.shape[1]
        and (mask is None or not mask.requires_grad)
        and not options.get("dropout")
        and options.get("softcap") is None
        and not any(_is_float(option) for option in options.values())
        and _has_amx()
    )


def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _bias(
    module: nn.Module, query: Tensor, attention_mask: Tensor | None, is_causal: bool | None
) -> Tensor | None:
    """What is added to the scores, by the rules of transformers' ``sdpa``."""
    if attention_mask is None:
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            return None
        shape = query.shape[2], query.shape[2]
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    # Not infinity: rows of padding may see no token at all.
    lowest = torch.finfo(torch.float32).min
    if _is_float(attention_mask):
        return attention_mask.float().clamp(min=lowest)
    bias = torch.zeros(attention_mask.shape, device=query.device)
    return bias.masked_fill_(~attention_mask, lowest)


def _in_float32(value: Any) -> Any:
    return value.float() if _is_float(value) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def use_cpu_attention(model: PreTrainedModel) -> bool:
    """Switch a half-precision model with ``sdpa`` to ``cpu_attention``; return whether it was
    switched."""
    return replace_sdpa(model, _NAME, cpu_attention)
