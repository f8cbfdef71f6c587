"""AdaLoRA's arithmetic compared with NumPy and autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakit.kernels.rank_allocation import (
    by_shape,
    keep_top,
    orthogonality,
    triplet_scores,
    update_importance,
)

#: (r, in) of several matrices: two of one shape, apart from each other.
SHAPES = [(3, 7), (3, 5), (3, 7), (2, 7)]


def tensors(seed: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def arrays(values: list[Tensor]) -> list[Any]:
    return [value.double().numpy() for value in values]


def test_positions_by_shape() -> None:
    assert by_shape(tensors(0)) == [[0, 2], [1], [3]]
    assert by_shape([]) == []


def test_importance_and_uncertainty_are_those_of_the_paper() -> None:
    """Equations 8 to 10 over five steps, written out in float64."""
    beta1, beta2 = 0.85, 0.6
    averages, uncertainties = ([torch.zeros(s) for s in SHAPES] for _ in range(2))
    want_I, want_U = ([np.zeros(s) for s in SHAPES] for _ in range(2))
    for step in range(5):
        weights, gradients = tensors(2 * step), tensors(2 * step + 1)
        kept = [w.clone() for w in weights]
        update_importance(averages, uncertainties, weights, gradients, beta1, beta2)
        for i, (w, g) in enumerate(zip(arrays(weights), arrays(gradients), strict=True)):
            sensitivity = np.abs(w * g)
            want_I[i] = beta1 * want_I[i] + (1 - beta1) * sensitivity
            want_U[i] = beta2 * want_U[i] + (1 - beta2) * np.abs(sensitivity - want_I[i])
        assert all(map(torch.equal, weights, kept)), "the weights are only looked at"
    for got, want in zip(averages + uncertainties, want_I + want_U, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_factor_s_part_of_the_score_is_its_mean(dim: int) -> None:
    """Rows of A and E are averaged over columns, columns of B over rows."""
    shapes = [s if dim else s[::-1] for s in [(3, 7), (3, 5), (3, 7), (3, 1)]]
    values = tensors(0, shapes)
    want = np.stack([v.mean(axis=dim) for v in arrays(values)])
    np.testing.assert_allclose(triplet_scores(values, dim).numpy(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("budget", range(13))
def test_exactly_the_best_of_the_budget_are_kept(budget: int) -> None:
    (scores,) = tensors(3, [(4, 3)])
    kept = keep_top(scores, budget)
    assert kept.shape == scores.shape
    assert kept.dtype == torch.bool
    assert int(kept.sum()) == budget
    if 0 < budget < 12:
        assert scores[kept].min() >= scores[~kept].max()


@pytest.mark.parametrize("budget", [1, 3, 7, 11])
def test_ties_do_not_change_the_count(budget: int) -> None:
    """A threshold would keep either all or none of the tied values."""
    for scores in (torch.zeros(4, 3), torch.full((4, 3), 0.1), torch.tensor([[1.0, 0.0, 1.0]] * 4)):
        kept = keep_top(scores, budget)
        assert int(kept.sum()) == budget
        assert torch.equal(kept, keep_top(scores, budget))
    assert keep_top(torch.zeros(4, 3), budget).flatten().tolist() == [i < budget for i in range(12)]


@pytest.mark.parametrize("mean_norm", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_the_penalty_and_its_gradient_are_autograd_s(columns: bool, mean_norm: bool) -> None:
    factors = [f.t().contiguous() if columns else f for f in tensors(4)]
    leaves = [f.double().requires_grad_() for f in factors]
    want = torch.zeros((), dtype=torch.float64)
    for leaf in leaves:
        gram = leaf.T @ leaf if columns else leaf @ leaf.T
        distance = gram - torch.eye(len(gram), dtype=torch.float64)
        want = want + (distance.norm() if mean_norm else distance.square().sum())
    want.backward()
    value, gradients = orthogonality(factors, columns, mean_norm)
    torch.testing.assert_close(value.double(), want.detach(), rtol=1e-5, atol=0)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean_norm", [False, True])
def test_orthonormal_rows_have_no_penalty(mean_norm: bool) -> None:
    value, (gradient,) = orthogonality([torch.eye(3, 5)], False, mean_norm)
    assert value == 0
    assert not gradient.any(), "nor a gradient that is not finite"
