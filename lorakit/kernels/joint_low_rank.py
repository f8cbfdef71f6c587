"""The low-rank updates of several adapters over one frozen weight, as batched products.

A run is a slice of neighboring adapters with factors of one shape. ``low_rank.lora_add_`` for each
adapter's own rows is the reference; here A is already multiplied by the scaling, which is cheaper
than to multiply A x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: scaling * A (adapters, r, in) and B (adapters, out, r) of a run, in float32 or the dtype of the
#: arithmetic.
Factors = tuple[Tensor, Tensor]


def joint_lora_add_(
    y: Tensor, x: Tensor, runs: Sequence[slice], factors: Sequence[Factors]
) -> Tensor:
    """Add B A x to ``y`` (adapters * n, out) for ``x`` (adapters, n, in), in place.

    ``factors`` are those of each run; the arithmetic is in the dtype of ``y``. Adapters outside the
    runs have no update. If ``y`` is a view, autograd copies its gradient several times.
    """
    apply: Any = _JointLoraAdd.apply
    added: Tensor = apply(y, x.to(y.dtype), list(runs), *_cast(factors, y.dtype))
    return added


def joint_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    runs: Sequence[slice],
    factors: Sequence[Factors],
) -> Tensor:
    """W x + b + B A x (adapters * n, out) for ``x`` (adapters, n, in) and a frozen
    ``weight`` (out, in) in its dtype, in which the arithmetic is; ``bias`` is frozen too.

    The backward pass adds the updates' part of dx into that of W, instead of writing both.
    """
    apply: Any = _JointLoraLinear.apply
    y: Tensor = apply(x, weight, bias, list(runs), *_cast(factors, x.dtype))
    return y


def _cast(factors: Sequence[Factors], dtype: torch.dtype) -> list[Tensor]:
    return [factor.to(dtype) for pair in factors for factor in pair]


def _add_updates(
    y: Tensor, x: Tensor, runs: Sequence[slice], factors: Sequence[Tensor]
) -> list[Tensor]:
    """Add the updates to ``y`` (adapters * n, out); return A x of each run."""
    y = y.view(len(x), -1, y.shape[-1])
    inner = []
    for own, A, B in zip(runs, factors[::2], factors[1::2], strict=True):
        h = torch.bmm(x[own], A.mT)
        y[own].baddbmm_(h, B.mT)
        inner.append(h)
    return inner


def _gradients(
    dy: Tensor,
    x: Tensor,
    runs: Sequence[slice],
    inner: Sequence[Tensor],
    factors: Sequence[Tensor],
    dx: Tensor | None,
    adds: bool,
) -> list[Tensor]:
    """dA and dB of each run. Writes the updates' part to ``dx`` (adapters, n, in), or adds it."""
    dy = dy.view(len(x), -1, dy.shape[-1])
    gradients: list[Tensor] = []
    for own, h, A, B in zip(runs, inner, factors[::2], factors[1::2], strict=True):
        dh = torch.bmm(dy[own], B)
        dB = torch.bmm(dy[own].mT, h) if B.is_contiguous() else torch.bmm(h.mT, dy[own]).mT
        gradients += [torch.bmm(dh.mT, x[own]), dB]
        if dx is not None:
            dx[own].baddbmm_(dh, A, beta=int(adds))
    return gradients


class _JointLoraAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, runs: list[slice], *factors: Tensor) -> Tensor:
        inner = _add_updates(y, x, runs, factors)
        ctx.mark_dirty(y)
        ctx.runs = runs
        ctx.save_for_backward(x, *inner, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dy, count = grad_outputs[0].contiguous(), len(ctx.runs)
        x, *saved = ctx.saved_tensors
        covered = sum(run.stop - run.start for run in ctx.runs) == len(x)
        new = torch.empty_like if covered else torch.zeros_like
        dx = new(x) if ctx.needs_input_grad[1] else None
        gradients = _gradients(dy, x, ctx.runs, saved[:count], saved[count:], dx, adds=False)
        return dy, dx, None, *gradients


class _JointLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        runs: list[slice],
        *factors: Tensor,
    ) -> Tensor:
        y = F.linear(x.flatten(0, 1), weight, bias)
        inner = _add_updates(y, x, runs, factors)
        ctx.runs = runs
        ctx.save_for_backward(x, weight, *inner, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dy, count = grad_outputs[0].contiguous(), len(ctx.runs)
        x, weight, *saved = ctx.saved_tensors
        dx = (dy @ weight).view_as(x) if ctx.needs_input_grad[0] else None
        gradients = _gradients(dy, x, ctx.runs, saved[:count], saved[count:], dx, adds=True)
        return dx, None, None, None, *gradients
