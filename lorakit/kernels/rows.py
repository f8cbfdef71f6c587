"""Rows of a matrix that recur with a period: those of q, k or v in a fused projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Some rows of a W (out_features, in_features): of each ``period`` rows those from ``start``
    to ``stop``. One period for q, k, v one after the other, one a head where they interleave."""

    start: int
    stop: int
    period: int

    def fit(self, rows: int) -> bool:
        """Whether a matrix of ``rows`` rows has them."""
        return 0 <= self.start < self.stop <= self.period and rows % self.period == 0

    def of(self, value: Tensor, dim: int = 0) -> Tensor:
        """The rows of ``value``, in order, along ``dim``."""
        return self._grouped(value, dim).flatten(dim, dim + 1)

    def put(self, value: Tensor, rows: Tensor) -> None:
        """Write ``rows`` into their places in dimension 0 of ``value``."""
        into = self._grouped(value, 0)
        into.copy_(rows.reshape(into.shape))

    def _grouped(self, value: Tensor, dim: int) -> Tensor:
        groups = value.shape[dim] // self.period
        shape = (*value.shape[:dim], groups, self.period, *value.shape[dim + 1 :])
        return value.view(shape).narrow(dim + 1, self.start, self.stop - self.start)
