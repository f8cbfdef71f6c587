"""Products with a frozen weight in 8-bit floating point (e4m3), scaled by row.

y = x W^T and dx = dy W both multiply with W, which is constant: it is quantized once by row for the
first product, and once by column for the second. x and dy are quantized by row in each pass, and
the sums are taken in float32. LoRA's factors and updates stay in x's dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

_MAX = 448.0  # of e4m3


class Fp8Weight(NamedTuple):
    """W (out, in): ``by_row`` (out, in) with ``row_scale`` (1, out), and its transpose
    ``by_column`` (in, out) with ``column_scale`` (1, in)."""

    by_row: Tensor
    row_scale: Tensor
    by_column: Tensor
    column_scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.by_row.shape[0], self.by_row.shape[1]

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.by_row.float() * self.row_scale.t()).to(dtype)


def quantize_weight(W: Tensor) -> Fp8Weight:
    by_row, row_scale = quantize_rows(W)
    by_column, column_scale = quantize_rows(W.t())
    return Fp8Weight(by_row, row_scale.t().contiguous(), by_column, column_scale.t().contiguous())


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, m) divided by its scale (n, 1), which maps each row's largest value to e4m3's."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / _MAX
    return (x.float() / scale).to(torch.float8_e4m3fn).contiguous(), scale


@library.custom_op("lorakit::fp8_product", mutates_args=())
def _fp8_product(
    x: Tensor,
    x_scale: Tensor,
    W: Tensor,
    W_scale: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    B: list[Tensor],
    scaling: list[float],
) -> Tensor:
    """x W^T + b, with scaling_i * h_i B_i^T added to its i-th block of columns."""
    y = torch._scaled_mm(
        x,
        W.t(),
        scale_a=x_scale,
        scale_b=W_scale,
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    column, rank = 0, 0
    for B_i, scaling_i in zip(B, scaling, strict=True):
        out, r = B_i.shape
        assert h is not None
        part = h[:, rank : rank + r]
        y[:, column : column + out].addmm_(part, B_i.t(), alpha=scaling_i)
        column, rank = column + out, rank + r
    return y


@_fp8_product.register_fake
def _(x: Tensor, _x_scale: Tensor, W: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape[0], W.shape[0], dtype=torch.bfloat16, device=x.device)


class _Fp8Linear(torch.autograd.Function):
    """Traced by torch.compile, which fuses the quantization with what computes x and dy."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Fp8Weight,
        bias: Tensor | None,
        A: Tensor | None,
        scaling: list[float],
        *B: Tensor,
    ) -> Tensor:
        h = None if A is None else x @ A.t()
        y: Tensor = _fp8_product(
            *quantize_rows(x), weight.by_row, weight.row_scale, bias, h, list(B), scaling
        )
        ctx.save_for_backward(weight.by_column, weight.column_scale, None if A is None else x, h, A)
        ctx.B, ctx.scaling = B, scaling
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        by_column, column_scale, x, h, A = ctx.saved_tensors
        dy = grad_outputs[0].contiguous()
        quantized = quantize_rows(dy)
        if A is None:
            dx = _fp8_product(*quantized, by_column, column_scale, None, None, [], [])
            return dx, None, None, None, None
        sizes, ranks = [B_i.shape[0] for B_i in ctx.B], [B_i.shape[1] for B_i in ctx.B]
        blocks = zip(dy.split(sizes, 1), h.split(ranks, 1), ctx.B, ctx.scaling, strict=True)
        dh, dB = [], []
        for dy_i, h_i, B_i, scaling_i in blocks:
            dh.append((dy_i @ B_i) * scaling_i)
            dB.append((dy_i.t() @ h_i) * scaling_i)
        joint = torch.cat(dh, dim=1)
        dx = _fp8_product(*quantized, by_column, column_scale, None, joint, [A.t()], [1.0])
        return dx, None, None, joint.t() @ x, None, *dB


def fp8_linear(
    x: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None,
    factors: list[tuple[Tensor, Tensor]],
    scaling: list[float],
) -> tuple[Tensor, ...]:
    """As ``lora_linear.lora_linear``, with x in bfloat16 and a quantized W; without ``factors``,
    the one output is x W^T + b."""
    A = torch.cat([A_i.to(x.dtype) for A_i, _ in factors]) if factors else None
    B = [B_i.to(x.dtype) for _, B_i in factors]
    y: Tensor = _Fp8Linear.apply(x, weight, bias, A, scaling, *B)  # type: ignore[no-untyped-call]
    parts: tuple[Tensor, ...] = y.split([len(B_i) for B_i in B], dim=1) if B else (y,)
    return parts
