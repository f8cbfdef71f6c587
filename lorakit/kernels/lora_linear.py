"""y = W x + b + scaling * B A x as one operator, for compiled layers.

torch.compile would copy W x before it adds the update to it, and save or recompute as it sees fit.
As an operator, the update is added in place, and the backward pass keeps x and A x only.
``kernels.low_rank.lora_add_`` on the base's own output is the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("lorakit::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    h = x @ A.t()
    y = x @ W.t() if bias is None else torch.addmm(bias, x, W.t())
    return y.addmm_(h, B.t(), alpha=scaling), h


@_lora_linear.register_fake
def _(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], W.shape[0]), x.new_empty(x.shape[0], A.shape[0])


@torch.library.custom_op("lorakit::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    dy: Tensor, x: Tensor, h: Tensor, W: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    dh = (dy @ B).mul_(scaling)
    dx = (dy @ W).addmm_(dh, A)
    return dx, dh.t() @ x, (dy.t() @ h).mul_(scaling)


@_lora_linear_backward.register_fake
def _(
    dy: Tensor, x: Tensor, h: Tensor, W: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(A), torch.empty_like(B)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W, _, A, B, ctx.scaling = inputs
    ctx.save_for_backward(x, output[1], W, A, B)


def _backward(ctx: Any, dy: Tensor, _dh: Tensor) -> tuple[Tensor | None, ...]:
    x, h, W, A, B = ctx.saved_tensors
    dx, dA, dB = _lora_linear_backward(dy.contiguous(), x, h, W, A, B, ctx.scaling)
    return dx, None, None, dA, dB, None


_lora_linear.register_autograd(_backward, setup_context=_save)


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """y (n, out) for x (n, in), all in x's dtype: W (out, in) and bias (out,) are frozen, A is
    (r, in), B (out, r)."""
    y: Tensor = _lora_linear(x, W, bias, A.to(x.dtype), B.to(x.dtype), scaling)[0]
    return y
