"""The low-rank updates of several adapters over one frozen weight, as batched products.

``low_rank.lora_add_`` for each adapter's own rows is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Neighboring adapters with factors of one shape, those from ``start`` to ``stop``; ``scaling``
    is a number, or (adapters, 1, 1) if they differ."""

    start: int
    stop: int
    scaling: float | Tensor

    def scale_(self, value: Tensor) -> Tensor:
        return value if isinstance(self.scaling, float) else value.mul_(self.scaling)

    @property
    def alpha(self) -> float:
        return self.scaling if isinstance(self.scaling, float) else 1.0


def joint_lora_add_(
    y: Tensor, x: Tensor, runs: Sequence[Run], factors: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Add scaling * B A x to ``y`` (adapters, n, out) for ``x`` (adapters, n, in), in place.

    ``factors`` are A (adapters of the run, r, in) and B (adapters of the run, out, r), in float32
    or the dtype of ``y``, in which the arithmetic is. Adapters outside the runs have no update.
    """
    cast = [factor.to(y.dtype) for pair in factors for factor in pair]
    apply: Any = _JointLowRank.apply
    added: Tensor = apply(y, x.to(y.dtype), list(runs), *cast)
    return added


class _JointLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, runs: list[Run], *factors: Tensor) -> Tensor:
        inner = []
        for run, A, B in zip(runs, factors[::2], factors[1::2], strict=True):
            own = slice(run.start, run.stop)
            h = run.scale_(torch.bmm(x[own], A.mT))
            y[own].baddbmm_(h, B.mT, alpha=run.alpha)
            inner.append(h)
        ctx.mark_dirty(y)
        ctx.runs = runs
        ctx.save_for_backward(x, *inner, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dy, runs = grad_outputs[0], ctx.runs
        x, *saved = ctx.saved_tensors
        inner, factors = saved[: len(runs)], saved[len(runs) :]
        needs_dx = ctx.needs_input_grad[1]
        covered = sum(run.stop - run.start for run in runs) == len(x)
        dx = (torch.empty_like(x) if covered else torch.zeros_like(x)) if needs_dx else None
        gradients: list[Tensor | None] = []
        for run, h, A, B in zip(runs, inner, factors[::2], factors[1::2], strict=True):
            own = slice(run.start, run.stop)
            dh = run.scale_(torch.bmm(dy[own], B))
            dB = torch.bmm(dy[own].mT, h) if B.is_contiguous() else torch.bmm(h.mT, dy[own]).mT
            if run.alpha != 1:
                dh, dB = dh.mul_(run.alpha), dB.mul_(run.alpha)
            gradients += [torch.bmm(dh.mT, x[own]), dB]
            if dx is not None:
                torch.bmm(dh, A, out=dx[own])
        return dy, dx, None, *gradients
