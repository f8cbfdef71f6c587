"""Compares the subspaces that the leading directions of two matrices span (Hu et al. 2021,
arXiv 2106.09685, section 7.2 and appendix G)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.analysis.spectrum import directions


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """phi (n1, n2) of orthonormal columns (n, n1) and (n, n2): in row i and column j, counted from
    1, ||first_i^T second_j||_F^2 / min(i, j), where x_i are the first i columns of x.

    1: one subspace contains the other; 0: they are orthogonal.
    """
    return (_overlap(first, second) / _smaller(first, second)).clamp(0, 1)


def projection_metric(first: Tensor, second: Tensor) -> Tensor:
    """d (n1, n2) = sqrt(p - sum_k sigma_k^2) with the singular values sigma of first_i^T second_j
    and p = min(i, j); d^2 = p (1 - phi)."""
    return (_smaller(first, second) - _overlap(first, second)).clamp(min=0).sqrt()


def random_similarity(n: int, ranks: Sequence[int], generator: torch.Generator) -> Tensor:
    """phi of two Gaussian matrices (n, ranks[0]) and (n, ranks[1]): what chance alone gives."""
    first, second = (
        directions(torch.randn(n, rank, generator=generator, dtype=torch.float64)) for rank in ranks
    )
    return similarity(first, second)


def _overlap(first: Tensor, second: Tensor) -> Tensor:
    """||first_i^T second_j||_F^2 for all i and j, from one product."""
    return (first.t() @ second).square().cumsum(0).cumsum(1)


def _smaller(first: Tensor, second: Tensor) -> Tensor:
    i, j = (torch.arange(1, x.shape[1] + 1, dtype=torch.float64) for x in (first, second))
    return torch.minimum(i[:, None], j[None, :])
