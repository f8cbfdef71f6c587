"""LoRA linears of one input as a single operator, for compiled layers.

y_i = W_i x + b_i + scaling_i * B_i A_i x for q, k and v, or gate and up: the W_i and A_i are
stacked, so that x is read once. Each output starts as its update, and the large product adds W x to
it as it writes its result: adding the update afterwards would read and write y once more. The
backward pass keeps x and A x only. A W in nf4 is dequantized within the operators.
``low_rank.lora_add_`` on the base's own output is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from lorakit.kernels import nf4


@library.custom_op("lorakit::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    A: Tensor,
    B: list[Tensor],
    scaling: list[float],
) -> tuple[Tensor, Tensor]:
    h = x @ A.t()
    y = x.new_empty(x.shape[0], sum(map(len, B)))
    for rows, ranks, B_i, scaling_i in _blocks(B, scaling):
        y[:, rows].addmm_(h[:, ranks], B_i.t(), beta=0, alpha=scaling_i)
    if bias is not None:
        y += bias
    return y.addmm_(x, _matrix(weight, x.dtype).t()), h


@_lora_linear.register_fake
def _(
    x: Tensor, weight: list[Tensor], _bias: Tensor | None, A: Tensor, B: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], sum(map(len, B))), x.new_empty(x.shape[0], A.shape[0])


@library.custom_op("lorakit::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    dy: Tensor, h: Tensor, weight: list[Tensor], A: Tensor, B: list[Tensor], scaling: list[float]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """dx, dh and each dB_i. dA = dh^T x is left to the caller: x may be recomputed for it, in one
    kernel with what needs dx."""
    blocks = _blocks(B, scaling)
    parts = [(dy[:, rows] @ B_i).mul_(scaling_i) for rows, _, B_i, scaling_i in blocks]
    dh = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    dx = (dh @ A).addmm_(dy, _matrix(weight, dy.dtype))
    dB = [(dy[:, rows].t() @ h[:, ranks]).mul_(scaling_i) for rows, ranks, _, scaling_i in blocks]
    return dx, dh, dB


@_lora_linear_backward.register_fake
def _(
    dy: Tensor, h: Tensor, weight: list[Tensor], A: Tensor, B: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dx = dy.new_empty(dy.shape[0], A.shape[1])
    return dx, torch.empty_like(h), [torch.empty_like(B_i) for B_i in B]


def _matrix(weight: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The stacked W (sum of out_i, in) of ``[W]`` or of ``nf4.stacked(...)``."""
    return weight[0] if len(weight) == 1 else nf4.dense(weight, dtype)


def _blocks(B: list[Tensor], scaling: list[float]) -> list[tuple[slice, slice, Tensor, float]]:
    """Each update's rows of the stacked W, its rows of the stacked A, its B and its scaling."""
    blocks, row, rank = [], 0, 0
    for B_i, scaling_i in zip(B, scaling, strict=True):
        out, r = B_i.shape
        blocks.append((slice(row, row + out), slice(rank, rank + r), B_i, scaling_i))
        row, rank = row + out, rank + r
    return blocks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, A, B, ctx.scaling = inputs
    ctx.parts = len(weight)
    ctx.save_for_backward(x, output[1], A, *weight, *B)


def _backward(ctx: Any, dy: Tensor, _dh: Tensor) -> tuple[Any, ...]:
    x, h, A, *rest = ctx.saved_tensors
    weight, B = rest[: ctx.parts], rest[ctx.parts :]
    dx, dh, dB = _lora_linear_backward(dy.contiguous(), h, weight, A, B, ctx.scaling)
    return dx, [None] * len(weight), None, dh.t() @ x, dB, None


_lora_linear.register_autograd(_backward, setup_context=_save)


def lora_linear(
    x: Tensor,
    W: Tensor | Sequence[Tensor],
    bias: Tensor | None,
    factors: list[tuple[Tensor, Tensor]],
    scaling: list[float],
) -> tuple[Tensor, ...]:
    """Each y_i (n, out_i) for x (n, in), in x's dtype.

    W (sum of out_i, in), or the tensors of ``nf4.stacked``, and ``bias`` are stacked and frozen;
    ``factors`` are A_i (r_i, in) and B_i (out_i, r_i).
    """
    weight = [W] if isinstance(W, Tensor) else list(W)
    A = torch.cat([A_i.to(x.dtype) for A_i, _ in factors])
    B = [B_i.to(x.dtype) for _, B_i in factors]
    y: Tensor = _lora_linear(x, weight, bias, A, B, scaling)[0]
    parts: tuple[Tensor, ...] = y.split([len(B_i) for B_i in B], dim=1)
    return parts
