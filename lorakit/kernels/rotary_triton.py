"""Rotary position embedding on a GPU: one kernel for either tensor in either pass.

transformers computes it from five operators, whose backward pass consists of about ten more, each
of which reads and writes the whole tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Elements of one half of the heads that a program rotates at once.
_BLOCK = 1024


@triton.jit
def _product(x, factor):  # type: ignore[no-untyped-def]
    """Rounded to the dtype of x, as each operator of transformers rounds."""
    return (x.to(tl.float32) * factor.to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _rotary_kernel(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    y,
    x_batch_stride,
    x_head_stride,
    x_token_stride,
    y_batch_stride,
    y_head_stride,
    y_token_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    heads,
    tokens,
    half,
    TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    cos += batch * cos_batch_stride + token * cos_token_stride + column
    sin += batch * sin_batch_stride + token * sin_token_stride + column
    cos1 = tl.load(cos, mask=column < half)
    cos2 = tl.load(cos + half, mask=column < half)
    sin1 = tl.load(sin, mask=column < half)
    sin2 = tl.load(sin + half, mask=column < half)
    x += batch * x_batch_stride + token * x_token_stride + head * x_head_stride + column
    x1 = tl.load(x, mask=inside)
    x2 = tl.load(x + half, mask=inside)
    if TRANSPOSED:
        y1 = _product(x1, cos1) + _product(x2, sin2)
        y2 = _product(x2, cos2) - _product(x1, sin1)
    else:
        y1 = _product(x1, cos1) - _product(x2, sin1)
        y2 = _product(x2, cos2) + _product(x1, sin2)
    y += batch * y_batch_stride + token * y_token_stride + head * y_head_stride + column
    tl.store(y, y1.to(x1.dtype), mask=inside)
    tl.store(y + half, y2.to(x1.dtype), mask=inside)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """y = x * cos + (-x2, x1) * sin for x = (x1, x2) in q and k (batch, heads, tokens, head_dim),
    with cos and sin (batch or 1, tokens, head_dim), in half precision; equal to transformers' to
    the bit, and so are the gradients. RoFormer, section 3.2.2, with halves instead of pairs."""
    rotated: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = (
            _rotated(grad, cos, sin, transposed=True) if needed else None
            for grad, needed in zip(grad_outputs, ctx.needs_input_grad, strict=False)
        )
        return dq, dk, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    """The rotation of x, or its inverse with ``transposed``."""
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    y = torch.empty_like(x)
    batch, heads, tokens, head_dim = x.shape
    half_block = triton.next_power_of_2(head_dim // 2)
    heads_block = min(triton.next_power_of_2(heads), max(1, _BLOCK // half_block))
    kernel: Any = _rotary_kernel[(batch * tokens, triton.cdiv(heads, heads_block))]
    kernel(
        x,
        cos,
        sin,
        y,
        *x.stride()[:3],
        *y.stride()[:3],
        *_strides(cos),
        *_strides(sin),
        heads,
        tokens,
        head_dim // 2,
        TRANSPOSED=transposed,
        HEADS=heads_block,
        HALF=half_block,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where two operators round twice
    )
    return y


def _strides(factors: Tensor) -> tuple[int, int]:
    """Of the batch, which may have one element for all rows, and of the tokens."""
    return (0 if len(factors) == 1 else factors.stride(0)), factors.stride(1)
