"""The memory of a GPU's fused attention, on the ``meta`` device.

There, torch's ``scaled_dot_product_attention`` would compute, and keep, the matrix of all attention
weights. A GPU's kernels keep the output and a value for each query instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

#: The memory-efficient kernel reads a mask whose rows are multiples of this many elements.
_MASK_MULTIPLE = 16


@library.custom_op("lorakit::planned_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, span: int
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("only for tensors without values")


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, span: int) -> tuple[Tensor, Tensor]:
    return _like(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


@library.custom_op("lorakit::planned_attention_backward", mutates_args=())
def _attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, span: int
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("only for tensors without values")


@_attention_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, span: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _like(x: Tensor, features: int | None = None) -> Tensor:
    """A tensor for each head of ``x`` (batch, heads, tokens, features), in which the heads of a
    token are next to each other, as the kernels write it."""
    batch, heads, tokens, own = x.shape
    return x.new_empty(batch, tokens, heads, features or own).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.span = inputs
    ctx.save_for_backward(q, k, v, mask, *output)


def _backward(ctx: Any, dy: Tensor, _sums: Tensor) -> tuple[Any, ...]:
    q, k, v, _, y, sums = ctx.saved_tensors
    return *_attention_backward(dy, q, k, v, y, sums, ctx.span), None, None


_attention.register_autograd(_backward, setup_context=_save)


def attention_temporary(dy: Tensor, q: Tensor, k: Tensor, *rest: Any) -> int:
    """The bytes that the backward pass sums gradients in: those of the queries in float32, and with
    grouped queries those of the keys and values of each query."""
    expanded = 2 * q.numel() * q.element_size() if k.shape[1] != q.shape[1] else 0
    return 4 * q.numel() + expanded


def attention_flops(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, span: int, **_: Any
) -> int:
    """Two products: ``span`` is the number of keys that a query sees on average."""
    return 4 * q.numel() * span


def attention_backward_flops(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, span: int, **_: Any
) -> int:
    """Five products: one of the forward pass is computed again."""
    return attention_flops(q, k, v, None, span) * 5 // 2


@contextmanager
def planned_attention(device_type: str) -> Iterator[None]:
    """Let attention on ``meta`` need as much in the block as on a device of this type."""
    original, own_varlen = F.scaled_dot_product_attention, _varlen_module()

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not _is_fused(query, key, dropout_p, device_type):
            options: Any = {"scale": scale, "enable_gqa": enable_gqa}
            return original(query, key, value, attn_mask, dropout_p, is_causal, **options)
        span = max(1, key.shape[2] // 2) if is_causal else key.shape[2]
        out: Tensor = _attention(query, key, value, _as_bias(attn_mask, query), span)[0]
        return out

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _q_ends: Any,
        _k_ends: Any,
        longest: int,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        batched = (part.transpose(0, 1)[None] for part in (q, k, v))
        out: Tensor = _attention(*batched, None, max(1, min(longest, len(k)) // 2))[0]
        return out[0].transpose(0, 1)

    before = getattr(own_varlen, "varlen_attn", None)
    F.scaled_dot_product_attention = attention
    if own_varlen is not None:
        own_varlen.varlen_attn = varlen
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
        if own_varlen is not None:
            own_varlen.varlen_attn = before


def _is_fused(query: Tensor, key: Tensor, dropout: float, device_type: str) -> bool:
    """Whether one kernel computes attention: on a GPU those for float32 do not support grouped
    queries, on a CPU none supports dropout."""
    if device_type == "cpu":
        return not dropout
    return query.dtype != torch.float32 or query.shape[1] == key.shape[1]


def _as_bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The mask as the kernel gets it: added to the products, in the dtype of the queries."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    *rows, columns = mask.shape
    padded = -(-columns // _MASK_MULTIPLE) * _MASK_MULTIPLE
    return query.new_empty(*rows, padded)


def _varlen_module() -> Any:
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    return varlen
