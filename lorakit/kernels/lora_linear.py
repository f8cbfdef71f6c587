"""LoRA linears of one input as a single operator, for compiled layers.

y_i = W_i x + b_i + scaling_i * B_i A_i x for q, k and v, or gate and up: the W_i and A_i are
stacked, so that all A_i x are one product. Each output starts as its update, and the large product
adds W x to it as it writes its result: adding the update afterwards would read and write y once
more. The backward pass keeps x and A x only. A W in nf4 is dequantized within the operators.
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
    widths: list[int],
) -> tuple[list[Tensor], Tensor]:
    """The outputs, of ``widths`` columns: either one for each B_i, or a single one; and A x."""
    h = x @ A.t()
    ys = [x.new_empty(x.shape[0], width) for width in widths]
    for y_i, ranks, B_i, scaling_i in _blocks(ys, B, scaling):
        y_i.addmm_(h[:, ranks], B_i.t(), beta=0, alpha=scaling_i)
    if bias is not None:
        for y, own in zip(ys, bias.split(widths), strict=True):
            y += own
    for y, W in zip(ys, _matrix(weight, x.dtype).split(widths), strict=True):
        y.addmm_(x, W.t())
    return ys, h


@_lora_linear.register_fake
def _(
    x: Tensor, _weight: list[Tensor], _bias: Tensor | None, A: Tensor, *others: Any
) -> tuple[list[Tensor], Tensor]:
    ys = [x.new_empty(x.shape[0], width) for width in others[-1]]
    return ys, x.new_empty(x.shape[0], A.shape[0])


@library.custom_op("lorakit::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    dys: list[Tensor],
    h: Tensor,
    weight: list[Tensor],
    A: Tensor,
    B: list[Tensor],
    scaling: list[float],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """dx, dh and each dB_i. dA = dh^T x is left to the caller: x may be recomputed for it, in one
    kernel with what needs dx."""
    blocks = _blocks(dys, B, scaling)
    parts = [(dy_i @ B_i).mul_(scaling_i) for dy_i, _, B_i, scaling_i in blocks]
    dh = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    dx = dh @ A
    widths = [dy.shape[1] for dy in dys]
    for dy, W in zip(dys, _matrix(weight, dx.dtype).split(widths), strict=True):
        dx.addmm_(dy, W)
    dB = [(dy_i.t() @ h[:, ranks]).mul_(scaling_i) for dy_i, ranks, _, scaling_i in blocks]
    return dx, dh, dB


@_lora_linear_backward.register_fake
def _(
    dys: list[Tensor], h: Tensor, _weight: list[Tensor], A: Tensor, B: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dx = h.new_empty(h.shape[0], A.shape[1])
    return dx, torch.empty_like(h), [torch.empty_like(B_i) for B_i in B]


def _matrix(weight: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The stacked W (sum of out_i, in) of ``[W]`` or of ``nf4.stacked(...)``."""
    return weight[0] if len(weight) == 1 else nf4.dense(weight, dtype)


def _blocks(
    ys: list[Tensor], B: list[Tensor], scaling: list[float]
) -> list[tuple[Tensor, slice, Tensor, float]]:
    """Each update's columns of the outputs ``ys``, its rows of the stacked A, its B and its
    scaling."""
    parts = ys if len(ys) > 1 else ys[0].split([len(B_i) for B_i in B], dim=1)
    blocks, rank = [], 0
    for part, B_i, scaling_i in zip(parts, B, scaling, strict=True):
        r = B_i.shape[1]
        blocks.append((part, slice(rank, rank + r), B_i, scaling_i))
        rank += r
    return blocks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    x, weight, _, A, B, ctx.scaling, _ = inputs
    ctx.parts = len(weight)
    ctx.save_for_backward(x, output[1], A, *weight, *B)


def _backward(ctx: Any, dys: list[Tensor], _dh: Tensor) -> tuple[Any, ...]:
    x, h, A, *rest = ctx.saved_tensors
    weight, B = rest[: ctx.parts], rest[ctx.parts :]
    dys = [dy.contiguous() for dy in dys]
    dx, dh, dB = _lora_linear_backward(dys, h, weight, A, B, ctx.scaling)
    return dx, [None] * len(weight), None, dh.t() @ x, dB, None, None


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
    outs = [len(B_i) for B_i in B]
    # Wide outputs stay apart: joining their gradients would take longer than a product for each.
    widths = outs if min(outs) > x.shape[1] else [sum(outs)]
    ys, _ = _lora_linear(x, weight, bias, A, B, scaling, widths)
    return tuple(ys) if len(ys) == len(outs) else tuple(ys[0].split(outs, dim=1))
