"""P theta for a fixed random P (D, d) that is never stored: the Fastfood transform.

P is generated from a seed, in blocks of L rows, where L is the smallest power of two >= d. Block b
consists of the first d columns of

    P_b = H G_b Pi_b H S_b / sqrt(d L),

where H is the Walsh-Hadamard matrix (entries +-1), S_b are random signs, Pi_b is a random
permutation and G_b Gaussian. A product takes O(D log L) operations and O(D) memory, where a dense P
takes O(D d) of both. Sources: Le, Sarlos and Smola 2013 (the transform, here without their matrix
that makes the row lengths chi-distributed); Li et al. 2018 (arXiv 1804.08838) and Aghajanyan et al.
2020 (arXiv 2012.13255) for theta_0 + P theta_d.

A saved theta is meaningful only with the same P. S, Pi and G therefore come from an integer hash
and a table instead of torch's generators, and are the same bits on every device and torch version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

#: Values of P theta computed at a time. Each takes about 60 bytes of scratch memory.
CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**21}

#: Keys of two independent sequences of random words: for the permutation, and for S and G.
_ORDER, _VALUES = 0x9E3779B9, 0x3C6EF372
_WORD = 0xFFFFFFFF
_GAUSSIAN_BITS = 16

_Integer = TypeVar("_Integer", int, Tensor)


# torch.compile would take minutes to trace the integer arithmetic of each matrix.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def project(theta: Tensor, size: int, seed: int, stream: int) -> Tensor:
    """P theta (size,) for theta (d,), in float32, or in float64 if theta is.

    Each row of P has expected squared norm 1, each entry mean 0 and variance 1/d, whatever
    ``size`` is: E||P theta||^2 = (size / d) ||theta||^2. Multiplied by sqrt(d / D), it is the P of
    Li et al. for D weights in total, whose columns have norm 1.

    ``seed`` (0 to 2^64 - 1) and ``stream`` (0 to 2^32 - 1) identify P: one seed for a model, one
    stream for each of its matrices. With the same seed and stream, a smaller ``size`` gives the
    first rows of a larger P. The gradient is P^T g, with P generated again, so that no tensor is
    kept for the backward pass.
    """
    P = Fastfood(theta.numel(), size, seed, stream)
    assert theta.ndim == 1, f"theta has shape {tuple(theta.shape)}"
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    values: Tensor = _Product.apply(theta.to(dtype), P, False)  # type: ignore[no-untyped-call]
    return values


class _Product(torch.autograd.Function):
    """P x, or P^T x if ``transposed``; each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, P: Fastfood, transposed: bool) -> Tensor:
        ctx.P, ctx.transposed = P, transposed
        return P.transposed_times(x) if transposed else P.times(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = _Product.apply(  # type: ignore[no-untyped-call]
            grad_outputs[0], ctx.P, not ctx.transposed
        )
        return grad, None, None


@dataclass(frozen=True)
class Fastfood:
    """The matrix P (size, d) of ``seed`` and ``stream``, as its two products."""

    d: int
    size: int
    seed: int
    stream: int

    def __post_init__(self) -> None:
        assert self.d > 0 and self.size > 0, f"P is {self.size} x {self.d}"
        assert 0 <= self.seed < 2**64, f"seed {self.seed}"
        assert 0 <= self.stream < 2**32, f"stream {self.stream}"

    @property
    def L(self) -> int:
        """Rows of a block."""
        return 1 << (self.d - 1).bit_length()

    @property
    def scale(self) -> float:
        return float((self.d * self.L) ** -0.5)

    def times(self, theta: Tensor) -> Tensor:
        """P theta (size,) for theta (d,)."""
        out = theta.new_empty(self.size)
        padded = F.pad(theta * self.scale, (0, self.L - self.d))
        for blocks, rows in self._chunks(theta.device):
            signs, order, gaussian = self.random_parts(blocks)
            mixed = hadamard(padded * signs).gather(1, order).mul_(gaussian)
            values = hadamard(mixed).flatten()
            out[rows] = values[: out[rows].numel()]
        return out

    def transposed_times(self, g: Tensor) -> Tensor:
        """P^T g (d,) for g (size,)."""
        total = g.new_zeros(self.L)
        for blocks, rows in self._chunks(g.device):
            signs, order, gaussian = self.random_parts(blocks)
            padding = blocks.numel() * self.L - g[rows].numel()
            mixed = hadamard(F.pad(g[rows], (0, padding)).view(-1, self.L)).mul_(gaussian)
            unmixed = torch.empty_like(mixed).scatter_(1, order, mixed)
            total += hadamard(unmixed).mul_(signs).sum(0)
        return total[: self.d] * self.scale

    def random_parts(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The diagonals of S and G and the permutation, each (n, L), for n block numbers.

        (Pi x)_k = x_order[k]. G takes the 2^16 quantile midpoints of the normal distribution,
        rescaled to variance 1.
        """
        order = torch.argsort(self._words(_ORDER, blocks), dim=1, stable=True)
        words = self._words(_VALUES, blocks)
        gaussian = gaussian_table(blocks.device)[words & (2**_GAUSSIAN_BITS - 1)]
        signs = (1 - 2 * (words >> _GAUSSIAN_BITS & 1)).to(gaussian.dtype)
        return signs, order, gaussian

    def _words(self, sequence: int, blocks: Tensor) -> Tensor:
        """Random 32-bit words (n, L), as int64, for n block numbers."""
        key = sequence
        for part in (self.seed & _WORD, self.seed >> 32, self.stream):
            key = _mix(key ^ _mix(part))
        keys = _mix(key ^ _mix(blocks)).unsqueeze(1)
        # Positions are mixed before they are combined with a key. Otherwise, two keys that differ
        # by less than L would give two blocks of the same words in different orders.
        positions = _mix(torch.arange(self.L, device=blocks.device))
        return _mix(keys ^ positions)

    def _chunks(self, device: torch.device) -> Iterator[tuple[Tensor, slice]]:
        """Yield block numbers and the rows that they produce; the last chunk ends at ``size``."""
        count = -(-self.size // self.L)
        step = max(1, CHUNK_ELEMENTS.get(device.type, 2**18) // self.L)
        for start in range(0, count, step):
            stop = min(start + step, count)
            rows = slice(start * self.L, min(stop * self.L, self.size))
            yield torch.arange(start, stop, device=device), rows


def hadamard(x: Tensor) -> Tensor:
    """H x for each row of x (n, L), L a power of two: H_2L = [[H_L, H_L], [H_L, -H_L]], H_1 = 1.

    Only sums and differences in a fixed order: the same bits on every device.
    """
    n, L = x.shape
    width = 1
    while width < L:
        left, right = x.view(n, -1, 2, width).unbind(2)
        x = torch.stack((left + right, left - right), dim=2).view(n, L)
        width *= 2
    return x


def _mix(x: _Integer) -> _Integer:
    """A bijection of 32-bit words in which each bit of x affects about half of the output bits.

    Two rounds of xorshift and multiply, with the constants of TheIronBorn (published in
    C. Wellons' hash-prospector). They are below 2^31, so no product passes 2^63 in int64.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & _WORD
    return x ^ (x >> 15)


@lru_cache(maxsize=8)
def gaussian_table(device: torch.device) -> Tensor:
    """2^16 equally likely values of mean 0 and variance 1, computed on the CPU for every device."""
    count = 2**_GAUSSIAN_BITS
    midpoints = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count
    values: Tensor = torch.special.ndtri(midpoints)
    return (values / values.square().mean().sqrt()).float().to(device)
