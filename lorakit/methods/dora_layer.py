"""DoRA's layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from lorakit.errors import AdapterError
from lorakit.kernels.low_rank import LowRankDelta, RowSlice, dora_add, row_norms, row_squares
from lorakit.layers import AdapterLayer, CompositeLayer
from lorakit.methods.lora_layer import LoraLayer

#: The largest relative change of a row's norm when W is rounded to bfloat16.
_ROUNDING = 2**-8


class DoraLayer(LoraLayer):
    """y = m * (W + scaling * B A) x / ||W + scaling * B A|| + b.

    The norm is taken of each row; ``lora_magnitude_vector`` m (out,) is trained.
    """

    def __init__(
        self, base_layer: nn.Module, *, r: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base_layer, r=r, scaling=scaling, dropout=dropout)
        self.lora_magnitude_vector = self.new_parameter(self.out_features)
        self._squares: tuple[Hashable, Tensor] | None = None

    def reset_parameters(self, init: str, name: str) -> None:
        """Initialize m with the norm that the forward pass divides by, bit for bit; a base on
        ``meta`` has none."""
        super().reset_parameters(init, name)
        if not self.is_meta:
            self.lora_magnitude_vector = nn.Parameter(self.norms())

    def norms(self) -> Tensor:
        """||W_i + scaling * (B A)_i|| (out,), without a gradient."""
        return row_norms(self.dense_weight(), self._base_squares(), *self.factors(), self.scaling)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        factor = self.lora_magnitude_vector / self.norms()
        if self.training and self.lora_dropout.p > 0:
            x = self.lora_dropout(x)
            plain = self.base_product(x)
        else:
            plain = y if self.bias is None else y - self.bias
        return dora_add(y, plain, x, *self.factors(), self.scaling, factor)

    def embed(self, ids: Tensor) -> Tensor:
        y = self.base_forward(ids)
        factor = self.lora_magnitude_vector / self.norms()
        A, B = self.factors()
        y = y.addcmul(y, (factor - 1).to(y.dtype))
        return self.add_embedding(y, ids, A, factor[:, None] * B)

    def delta_weight(self) -> Tensor:
        """The total change of W: the merged W minus W."""
        W = self.dense_weight()
        return self.merged_weight(W) - W.float()

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        A, B = self.factors()
        return self._normalized(
            weight.float() + LowRankDelta(A, B, self.scaling).dense(), slice(None)
        )

    @torch.no_grad()
    def merged_rows(self, weight: Tensor, start: int) -> Tensor | None:
        if type(self).merged_weight is not DoraLayer.merged_weight:
            return None
        A, B = self.factors()
        own = slice(start, start + len(weight))
        delta = LowRankDelta(A, B[own], self.scaling).dense()
        return self._normalized(delta.add_(weight), own)

    def _normalized(self, merged: Tensor, rows: slice) -> Tensor:
        """m * merged / ||merged|| for the ``rows`` of W, in place."""
        norm = torch.linalg.vector_norm(merged, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        factor = self.lora_magnitude_vector.detach()[rows].float() / norm
        return merged.mul_(factor[:, None])

    @classmethod
    def join(cls, composite: CompositeLayer) -> LoraLayer:
        """In rows outside the parts, m is the norm of the row, computed by the same operation as in
        PEFT, so that m / norm is exactly 1. Raises AdapterError if parts have rows in common, for
        which there is no common m."""
        if composite.overlaps:
            raise AdapterError("parts that overlap do not form one DoRA layer; allowed: no overlap")
        layer = super().join(composite)
        assert isinstance(layer, DoraLayer)
        m = _norms(layer.dense_weight())
        for name, part in composite.parts.items():
            assert isinstance(part, DoraLayer)
            composite.rows(name).put(m, part.lora_magnitude_vector.detach())
        layer.lora_magnitude_vector = nn.Parameter(m, requires_grad=False)
        return layer

    def split(self, parts: Mapping[str, tuple[RowSlice, int]]) -> CompositeLayer:
        given = super().split(parts)
        m = self.lora_magnitude_vector.detach()
        for name, part in given.parts.items():
            own = given.rows(name).of(m).clone()
            part.lora_magnitude_vector = nn.Parameter(own, requires_grad=False)
        composite = _DoraParts(self.base_layer, given.parts, m)
        if not self.is_meta:
            composite.check_covered(self.dense_weight())
        return composite

    def _base_squares(self) -> Tensor:
        """||W_i||^2 (out,), cached until W changes."""
        W = self.dense_weight().detach()
        if torch.compiler.is_compiling():  # data_ptr cannot be traced
            return row_squares(W)
        if self._squares is None or self._squares[0] != self.base_state:
            self._squares = self.base_state, row_squares(W)
        return self._squares[1]


class _DoraParts(CompositeLayer):
    """Parts whose magnitudes were stored for all rows of the base.

    If the base is on ``meta``, those outside the parts are checked during a merge.
    """

    def __init__(
        self, base_layer: nn.Module, parts: Mapping[str, AdapterLayer], stored: Tensor
    ) -> None:
        super().__init__(base_layer, parts)
        self._stored = stored

    def check_covered(self, weight: Tensor) -> None:
        """Raise AdapterError unless the magnitude of each row outside the parts is its norm in
        ``weight``."""
        expected = _norms(weight)
        for name in self.parts:
            self.rows(name).put(expected, self.rows(name).of(self._stored))
        if ((self._stored - expected).abs() > expected.abs() * _ROUNDING).any():
            raise AdapterError(
                f"the parts {', '.join(self.parts)} do not cover all changes by "
                "lora_magnitude_vector"
            )

    def merged_weight(self, weight: Tensor) -> Tensor:
        if self.is_meta:
            self.check_covered(weight)
        return super().merged_weight(weight)


def _norms(weight: Tensor) -> Tensor:
    """||W_i|| (out,)"""
    norms: Tensor = torch.linalg.vector_norm(weight.detach().float(), dim=1)
    return norms
