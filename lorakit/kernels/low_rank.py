"""Low-rank updates of a weight: LoRA's and DoRA's arithmetic, and slices of a weight's rows.

No tensor of the size of the weight W (out, in) or of a second output is made: the product
scaling * B A x is added into the output of the frozen layer, and DoRA's norms come from W A^T
(out, r) and A A^T (r, r). What is kept for the backward pass is x, x A^T and the factors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowSlice:
    """Rows of a W (out_features, in_features): those from ``start`` to ``stop`` in each ``period``
    rows. A projection that stacks q, k and v is one period; if the heads are interleaved, each
    head is one."""

    start: int
    stop: int
    period: int

    def fit(self, rows: int) -> bool:
        """Whether the slice fits a matrix of ``rows`` rows."""
        return 0 <= self.start < self.stop <= self.period and rows % self.period == 0

    def of(self, value: Tensor, dim: int = 0) -> Tensor:
        """The rows of ``value``, in order, along ``dim``."""
        return self._grouped(value, dim).flatten(dim, dim + 1)

    def put(self, value: Tensor, rows: Tensor) -> None:
        """Write ``rows`` to the slice's rows of ``value``."""
        into = self._grouped(value, 0)
        into.copy_(rows.reshape(into.shape))

    def _grouped(self, value: Tensor, dim: int) -> Tensor:
        groups = value.shape[dim] // self.period
        shape = (*value.shape[:dim], groups, self.period, *value.shape[dim + 1 :])
        return value.view(shape).narrow(dim + 1, self.start, self.stop - self.start)


def is_covered_by(B: Tensor, parts: Iterable[tuple[RowSlice, int]]) -> bool:
    """Whether ``parts``, pairs of rows and rank, cover all of B (out_features, r): each part has
    its own columns, in order, and is zero outside its rows."""
    rest, at = B.detach().clone(), 0
    for rows, r in parts:
        if not rows.fit(len(B)) or at + r > B.shape[1]:
            return False
        columns = rest[:, at : at + r]
        rows.put(columns, torch.zeros_like(rows.of(columns)))
        at += r
    return at == B.shape[1] and not rest.any()


@dataclass(frozen=True)
class LowRankDelta:
    """scaling * B A: ``A`` (r, in_features) and ``B`` (out_features, r)."""

    A: Tensor
    B: Tensor
    scaling: float

    def dense(self) -> Tensor:
        """The product in float32, (out_features, in_features)."""
        return (self.B.float() @ self.A.float()) * self.scaling

    def rows_into(self, out: Tensor, start: int) -> None:
        """Write the rows of ``dense()`` from ``start`` on into ``out``; the factors are float32."""
        torch.mm(self.B[start : start + len(out)], self.A, out=out)
        out.mul_(self.scaling)


def lora_add_(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Add the update to ``y`` (n, out_features) for ``x`` (n, in_features).

    lora_A is (r, in_features), lora_B (out_features, r). The arithmetic is in ``y``'s dtype, even
    if the factors are float32."""
    h = F.linear(x, lora_A.to(x.dtype))
    return y.addmm_(h.to(y.dtype), lora_B.to(y.dtype).t(), alpha=scaling)


#: Elements of a half-precision W that are converted to float32 at a time: 16 MiB.
CHUNK_ELEMENTS = 2**22
_FLOAT32 = torch.finfo(torch.float32)


def row_squares(W: Tensor) -> Tensor:
    """||W_i||^2 (out,) of W (out, in), float32."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(W, dim=1, dtype=dtype)
    return norms.float().square()


@torch.no_grad()
def row_norms(W: Tensor, squares: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """||W_i + s (B A)_i|| (out,), float32, without a gradient; ``squares`` are W's own.

    ||W_i||^2 + 2 s (W A^T)_i . B_i + s^2 B_i A A^T B_i^T. If the update cancels a row, the norm is
    that of the sum's rounding error, so that nothing is divided by zero.
    """
    A, B = A.float(), B.float() * scaling
    # Autocast would round the products to half precision.
    with torch.autocast("cpu" if W.is_meta else W.device.type, enabled=False):
        update = ((B @ (A @ A.t())) * B).sum(1)
        total = squares + 2 * (_product(W, A) * B).sum(1) + update
    noise = (squares + update) * _FLOAT32.eps
    return torch.maximum(total, noise).clamp_min(_FLOAT32.tiny).sqrt()


def _product(W: Tensor, A: Tensor) -> Tensor:
    """W A^T (out, r) in float32."""
    if W.dtype == torch.float32:
        return F.linear(W, A)
    rows = max(1, CHUNK_ELEMENTS // W.shape[1])
    return torch.cat([F.linear(part.float(), A) for part in W.split(rows)])


def dora_add(
    y: Tensor, plain: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, factor: Tensor
) -> Tensor:
    """y + (factor - 1) plain + factor * s B A x, in ``y``'s dtype.

    ``y`` = W x + b and ``plain`` = W x are (n, out), x (n, in), ``factor`` (out,) float32. The
    terms added to ``y`` are exactly zero where factor is 1 and B A zero. In half precision,
    factor - 1 retains digits that factor itself, which is near 1, would lose.
    """
    h = F.linear(x, A.to(x.dtype)).to(y.dtype)
    scaled_B = (factor * scaling)[:, None] * B
    out = torch.addcmul(y, plain.to(y.dtype), (factor - 1).to(y.dtype))
    return out.addmm_(h, scaled_B.to(y.dtype).t())
