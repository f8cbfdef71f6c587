"""LoRA linears of one input as a single operator, for compiled layers.

y_i = W_i x + b_i + scaling_i * B_i A_i x for q, k and v, or gate and up: the A_i are stacked, so
that all A_i x are one product, and so may be the W_i. Each output starts as its update, and the
large product adds W x to it as it writes its result: adding the update afterwards would read and
write y once more. The backward pass keeps x and A x only. A W in nf4 is dequantized within the
operators.
``low_rank.lora_add_`` on the base's own output is the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.nn.functional import pad

from lorakit.kernels import nf4


@library.custom_op("lorakit::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, A: Tensor, B: Tensor, widths: list[int]
) -> tuple[list[Tensor], Tensor]:
    """The columns of y = x W^T + b + h B^T as several outputs of ``widths``, and h = x A^T."""
    h = x @ A.t()
    ys = [h @ own.t() for own in B.split(widths)]
    if bias is not None:
        for y, own in zip(ys, bias.split(widths), strict=True):
            y += own
    for y, W in _products(ys, weight):
        y.addmm_(x, W.t())
    return ys, h


@_lora_linear.register_fake
def _(
    x: Tensor, _weight: Any, _bias: Any, A: Tensor, _B: Tensor, widths: list[int]
) -> tuple[list[Tensor], Tensor]:
    ys = [x.new_empty(x.shape[0], width) for width in widths]
    return ys, x.new_empty(x.shape[0], A.shape[0])


@library.custom_op("lorakit::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    dys: list[Tensor], h: Tensor, weight: list[Tensor], A: Tensor, B: Tensor, needs_dx: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (empty unless needed), dh and dB. dA = dh^T x is left to the caller: x may be recomputed
    for it, in one kernel with what needs dx."""
    widths = [dy.shape[1] for dy in dys]
    dh, dB = torch.zeros_like(h), torch.empty_like(B)
    for dy, own, into in zip(dys, B.split(widths), dB.split(widths), strict=True):
        dh.addmm_(dy, own)
        torch.mm(dy.t(), h, out=into)
    if not needs_dx:
        return h.new_empty(0), dh, dB
    dx = dh @ A
    for dy, W in _products(dys, weight):
        dx.addmm_(dy, W)
    return dx, dh, dB


@_lora_linear_backward.register_fake
def _(
    _dys: list[Tensor],
    h: Tensor,
    _weight: list[Tensor],
    A: Tensor,
    B: Tensor,
    needs_dx: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = h.new_empty(h.shape[0], A.shape[1]) if needs_dx else h.new_empty(0)
    return dx, torch.empty_like(h), torch.empty_like(B)


def _products(ys: list[Tensor], weight: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs, or columns of one, and their W. ``weight`` has a single stacked W, one for each
    linear, or the tensors of ``nf4.stacked(...)``."""
    if not weight[0].is_floating_point():
        weight = [nf4.dense(weight, ys[0].dtype)]
    if len(weight) == 1:
        yield from zip(ys, weight[0].split([y.shape[1] for y in ys]), strict=True)
    elif len(ys) == 1:
        yield from zip(ys[0].split([len(W) for W in weight], dim=1), weight, strict=True)
    else:
        yield from zip(ys, weight, strict=True)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    x, weight, _, A, B, _ = inputs
    ctx.save_for_backward(x, output[1], A, B, *weight)


def _backward(ctx: Any, dys: list[Tensor], _dh: Tensor) -> tuple[Any, ...]:
    x, h, A, B, *weight = ctx.saved_tensors
    dys = [dy.contiguous() for dy in dys]
    needs_dx = ctx.needs_input_grad[0]  # the first layer's x is computed from frozen embeddings
    dx, dh, dB = _lora_linear_backward(dys, h, weight, A, B, needs_dx)
    return dx if needs_dx else None, [None] * len(weight), None, dh.t() @ x, dB, None


_lora_linear.register_autograd(_backward, setup_context=_save)


def lora_linear(
    x: Tensor,
    W: Tensor | Sequence[Tensor],
    bias: Tensor | None,
    factors: list[tuple[Tensor, Tensor]],
    scaling: list[float],
) -> tuple[Tensor, ...]:
    """Each y_i (n, out_i) for x (n, in), in x's dtype.

    W (sum of out_i, in), the W_i (out_i, in), or the tensors of ``nf4.stacked``, and the stacked
    ``bias`` are frozen; ``factors`` are A_i (r_i, in) and B_i (out_i, r_i).
    """
    weight = [W] if isinstance(W, Tensor) else list(W)
    A = torch.cat([A_i.to(x.dtype) for A_i, _ in factors])
    B = _diagonal([s * B_i for (_, B_i), s in zip(factors, scaling, strict=True)]).to(x.dtype)
    outs = [len(B_i) for _, B_i in factors]
    # Wide outputs stay apart: joining their gradients would take longer than a product for each.
    widths = outs if min(outs) > x.shape[1] else [sum(outs)]
    ys, _ = _lora_linear(x, weight, bias, A, B, widths)
    return tuple(ys) if len(ys) == len(outs) else tuple(ys[0].split(outs, dim=1))


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """The blocks (out_i, r_i) on the diagonal of one matrix, zeros elsewhere: one product with it
    takes as long as one with each block."""
    ranks = [block.shape[1] for block in blocks]
    rows = [pad(block, (sum(ranks[:i]), sum(ranks[i + 1 :]))) for i, block in enumerate(blocks)]
    return torch.cat(rows)
