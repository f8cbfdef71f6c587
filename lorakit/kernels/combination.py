"""Combinations of the same tensor of several adapters, as PEFT's ``add_weighted_adapter`` has them.

TIES (Yadav et al. 2023, arXiv 2306.01708) keeps the largest values of each tensor, elects a sign
for each element and averages the values of that sign. DARE (Yu et al. 2023, arXiv 2311.03099) drops
random values and rescales the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Returns a tensor with some of its values set to zero.
Prune = Callable[[Tensor], Tensor]


def keep_largest(density: float) -> Prune:
    """Keep the share ``density`` of the elements with the largest magnitudes, rounded down."""

    def prune(value: Tensor) -> Tensor:
        if density >= 1:
            return value
        flat = value.reshape(-1)
        kept = torch.topk(flat.abs(), int(density * flat.numel())).indices
        return torch.zeros_like(flat).scatter_(0, kept, flat[kept]).view_as(value)

    return prune


def keep_random(density: float, generator: torch.Generator) -> Prune:
    """Keep each element with probability ``density``, divided by it."""

    def prune(value: Tensor) -> Tensor:
        if density >= 1:
            return value
        mask = torch.bernoulli(torch.full_like(value, density), generator=generator)
        return value * mask / density

    return prune


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """w_1 v_1 + w_2 v_2 + ..., of values of the same shape."""
    return _weighted(torch.stack(list(values)), weights).sum(0)


def agreeing_mean(
    values: Sequence[Tensor], weights: Sequence[float], majority_sign: str = "total"
) -> Tensor:
    """The sum of w_i v_i over the values whose sign is the elected one, divided by their number.

    The sign of an element is that of the sum of its values (``total``) or of their signs
    (``frequency``), and + if that is 0. All ``values`` have the same shape.
    """
    stacked = torch.stack(list(values))
    votes = stacked if majority_sign == "total" else stacked.sign()
    elected = torch.where(votes.sum(0) >= 0, 1, -1)
    agrees = stacked.sign() == elected
    return (_weighted(stacked, weights) * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def truncated_product(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A' (r, in) and B' (out, r) whose product is the best approximation of B A of rank
    ``r``: A (k, in) and B (out, k) are the factors. The ranks are smaller if k is."""
    left, right = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().t())
    U, S, Vh = torch.linalg.svd(left.R @ right.R.t(), full_matrices=False)
    kept_B = left.Q @ (U[:, :r] * S[:r])
    kept_A = Vh[:r] @ right.Q.t()
    return kept_A.float().contiguous(), kept_B.float().contiguous()


def _weighted(stacked: Tensor, weights: Sequence[float]) -> Tensor:
    factors = torch.tensor(weights, dtype=stacked.dtype)
    return stacked * factors.view(-1, *[1] * (stacked.dim() - 1))
