"""Singular values, effective rank and amplification compared with NumPy on the dense product."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lorakit.analysis.spectrum import directions, spectrum

SHAPES = [(24, 40, 5), (40, 24, 8), (6, 30, 16), (300, 200, 1)]


def factors(out: int, inward: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out)
    return torch.randn(r, inward, generator=generator), torch.randn(out, r, generator=generator)


@pytest.mark.parametrize(("out", "inward", "r"), SHAPES)
def test_equals_the_decomposition_of_the_dense_product(out: int, inward: int, r: int) -> None:
    A, B = factors(out, inward, r)
    dense = 0.7 * B.double().numpy() @ A.double().numpy()
    _, values, _ = np.linalg.svd(dense, full_matrices=False)
    found = spectrum(A, B, 0.7)
    n = min(out, inward, r)
    assert found.S.shape == (n,)
    np.testing.assert_allclose(found.S, values[:n], rtol=1e-6)
    np.testing.assert_allclose(found.U @ found.S.diag() @ found.V.t(), dense, atol=1e-6)
    for vectors in (found.U, found.V):
        np.testing.assert_allclose(vectors.t() @ vectors, np.eye(n), atol=1e-10)
    assert found.norm == pytest.approx(np.linalg.norm(dense), rel=1e-6)
    p = values[:n] / values[:n].sum()
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amplification(dtype: torch.dtype) -> None:
    A, B = factors(24, 40, 5)
    W = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    dense = 2.0 * B.double().numpy() @ A.double().numpy()
    U, _, Vt = np.linalg.svd(dense)
    want = np.linalg.norm(dense) / np.linalg.norm(U[:, :5].T @ W.double().numpy() @ Vt[:5].T)
    assert spectrum(A, B, 2.0).amplification(W) == pytest.approx(want, rel=1e-6)
    # W emphasizes exactly these directions, so that the ratio is that of the norms.
    assert spectrum(A, B).amplification((B @ A) * 4) == pytest.approx(0.25, rel=1e-5)


def test_equal_singular_values_have_the_rank_as_effective_rank() -> None:
    Q = torch.linalg.qr(torch.randn(30, 6, generator=torch.Generator().manual_seed(0)))[0]
    assert spectrum(Q.t(), Q).effective_rank == pytest.approx(6, rel=1e-5)
    one = spectrum(Q.t(), Q * torch.tensor([1, 1e-9, 0, 0, 0, 0]))
    assert one.effective_rank == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("r", [0, 3])
def test_a_zero_update(r: int) -> None:
    found = spectrum(torch.ones(r, 8), torch.zeros(9, r))
    assert (found.norm, found.effective_rank) == (0.0, 0.0)
    assert found.amplification(torch.ones(9, 8)) is None
    assert directions(torch.zeros(9, r)).shape == (9, 0)


def test_directions_leave_out_what_is_zero() -> None:
    factor = torch.zeros(10, 4)
    factor[3, 1], factor[5, 0] = 2, -7
    found = directions(factor)
    assert found.shape == (10, 2)
    assert found[5, 0].abs() == pytest.approx(1)
    assert found[3, 1].abs() == pytest.approx(1)
    assert math.isclose(float(found.norm()), math.sqrt(2))
