"""The singular values and vectors of dW = scaling * B A, from its factors, in float64.

With B = Q_B R_B and A^T = Q_A R_A, the singular values of dW are those of the r x r matrix
scaling * R_B R_A^T. No matrix of the size of dW is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements of W that are converted to float64 at a time: 32 MiB.
_CHUNK_ELEMENTS = 2**22
_EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Spectrum:
    """dW = U diag(S) V^T without the singular values that are zero up to rounding: ``U`` (out, n),
    ``S`` (n,) in descending order, ``V`` (in, n)."""

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def norm(self) -> float:
        """||dW||_F."""
        return float(self.S.norm())

    @property
    def effective_rank(self) -> float:
        """exp(-sum_i p_i ln p_i) with p_i = S_i / sum S; 0 for dW = 0."""
        if not len(self.S):
            return 0.0
        p = self.S / self.S.sum()
        return float((-(p * p.log()).sum()).exp())

    def amplification(self, W: Tensor) -> float | None:
        """||dW||_F / ||U^T W V||_F for W (out, in); None if either is zero."""
        projected = torch.zeros(len(self.S), len(self.S), dtype=torch.float64)
        rows = max(1, _CHUNK_ELEMENTS // max(1, W.shape[1]))
        for start in range(0, len(W), rows):
            part = slice(start, start + rows)
            projected += self.U[part].t() @ (W[part].double() @ self.V)
        within = float(projected.norm())
        return self.norm / within if within and self.norm else None


def spectrum(A: Tensor, B: Tensor, scaling: float = 1.0) -> Spectrum:
    """Decompose scaling * B A: A (r, in), B (out, r)."""
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().t())
    left, values, right = torch.linalg.svd(scaling * R_B @ R_A.t(), full_matrices=False)
    n = _rank(values, max(len(B), A.shape[1]))
    return Spectrum(Q_B @ left[:, :n], values[:n], Q_A @ right[:n].t())


def directions(factor: Tensor) -> Tensor:
    """The left-singular vectors of ``factor`` (n, r), by descending singular value, (n, rank)."""
    Q, R = torch.linalg.qr(factor.double())
    left, values, _ = torch.linalg.svd(R, full_matrices=False)
    leading: Tensor = Q @ left[:, : _rank(values, len(factor))]
    return leading


def _rank(values: Tensor, size: int) -> int:
    """How many of the singular ``values`` of a matrix of that ``size`` are not just rounding."""
    return int((values > values.max() * size * _EPSILON).sum()) if len(values) else 0
