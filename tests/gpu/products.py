"""Products of LoRA layers on a GPU, compared with the formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Factors = list[tuple[Tensor, Tensor]]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def draw_factors(outs: Sequence[int], size: int, ranks: Sequence[int]) -> Factors:
    return [(draw(r, size), draw(out, r)) for out, r in zip(outs, ranks, strict=True)]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def assert_close_to_formula(
    product: Callable[[Tensor, Factors, list[float]], Tensor],
    W: Tensor,
    bias: Tensor | None,
    factors: Factors,
    tolerance: float,
) -> None:
    """``product(x, factors, scaling)`` is W x + b with each scaling_i B_i A_i x in its own rows, and
    so are its gradients, within ``tolerance`` relative to the norm."""
    x = draw(40, W.shape[1]).requires_grad_()
    leaves = [x, *(factor.requires_grad_() for pair in factors for factor in pair)]
    scaling = [0.5 + i for i in range(len(factors))]
    y = product(x, factors, scaling)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = exact[0] @ W.double().t() + (0 if bias is None else bias.double())
    pairs = zip(exact[1::2], exact[2::2], scaling, strict=True)
    updates = [s * (exact[0] @ A.t()) @ B.t() for A, B, s in pairs]
    wanted = wanted + torch.cat(updates, dim=1) if updates else wanted
    assert relative(y.detach(), wanted.detach()) < tolerance
    slope = draw(40, len(W))
    y.backward(slope)
    wanted.backward(slope.double())
    for found, reference in zip(leaves, exact, strict=True):
        assert found.grad is not None
        assert reference.grad is not None
        assert relative(found.grad, reference.grad) < tolerance
