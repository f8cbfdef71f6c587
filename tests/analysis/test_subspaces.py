"""phi and the projection metric of subspaces whose angles are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakit.analysis.subspaces import projection_metric, random_similarity, similarity


def axes(*indices: int) -> Tensor:
    return torch.eye(8, dtype=torch.float64)[:, list(indices)]


def test_identical_subspaces() -> None:
    Q = torch.linalg.qr(torch.randn(20, 5, dtype=torch.float64))[0]
    phi, d = similarity(Q, Q), projection_metric(Q, Q)
    torch.testing.assert_close(phi, torch.ones(5, 5, dtype=torch.float64))
    torch.testing.assert_close(d, torch.zeros(5, 5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_orthogonal_subspaces() -> None:
    phi, d = similarity(axes(0, 1), axes(2, 3, 4)), projection_metric(axes(0, 1), axes(2, 3, 4))
    assert phi.tolist() == [[0, 0, 0], [0, 0, 0]]
    expected = [[1, 1, 1], [1, math.sqrt(2), math.sqrt(2)]]
    torch.testing.assert_close(d, torch.tensor(expected, dtype=torch.float64))


def test_one_common_direction() -> None:
    """Only the second direction of the first and the third of the second are the same."""
    phi = similarity(axes(0, 1), axes(2, 3, 1))
    assert phi.tolist() == [[0, 0, 0], [0, 0, 0.5]]
    assert projection_metric(axes(0, 1), axes(2, 3, 1))[1, 2] == 1


@pytest.mark.parametrize("angle", [0.1, 0.7, 1.3])
def test_an_angle(angle: float) -> None:
    """Two planes with a common axis, whose second axes enclose ``angle``."""
    turned = axes(0, 1)
    turned[:, 1] = math.cos(angle) * axes(1)[:, 0] + math.sin(angle) * axes(2)[:, 0]
    phi, d = similarity(axes(0, 1), turned), projection_metric(axes(0, 1), turned)
    cos2 = math.cos(angle) ** 2
    expected = [[1, 1], [1, (1 + cos2) / 2]]
    torch.testing.assert_close(phi, torch.tensor(expected, dtype=torch.float64))
    assert d[1, 1] == pytest.approx(math.sin(angle))


def test_equals_the_definition_for_every_i_and_j() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.linalg.qr(torch.randn(30, r, generator=generator, dtype=torch.float64))[0]
        for r in (4, 7)
    )
    phi, d = similarity(first, second), projection_metric(first, second)
    for i in range(1, 5):
        for j in range(1, 8):
            product = first[:, :i].numpy().T @ second[:, :j].numpy()
            sigma = np.linalg.svd(product, compute_uv=False)
            p = min(i, j)
            want = np.linalg.norm(product) ** 2 / p
            assert phi[i - 1, j - 1] == pytest.approx(want, rel=1e-6)
            assert d[i - 1, j - 1] == pytest.approx(math.sqrt(p - (sigma**2).sum()), rel=1e-6)


def test_random_subspaces_are_as_similar_as_their_size() -> None:
    """The expected phi of random subspaces is max(i, j) / n."""
    generator = torch.Generator().manual_seed(0)
    draws = [random_similarity(64, (4, 8), generator) for _ in range(200)]
    mean = torch.stack(draws).mean(0)
    assert mean.shape == (4, 8)
    assert mean[3, 7] == pytest.approx(8 / 64, rel=0.1)
    assert mean[0, 0] == pytest.approx(1 / 64, rel=0.3)
