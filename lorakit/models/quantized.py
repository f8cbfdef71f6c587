"""Frozen linear layers whose weight is kept in fewer bits; each form has a module of its own."""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn


class QuantizedWeight(Protocol):
    """A NamedTuple of the tensors that hold a quantized W (out, in)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W, dequantized."""

    def _asdict(self) -> dict[str, Any]: ...


W = TypeVar("W", bound=QuantizedWeight)


class QuantizedLinear(nn.Module, Generic[W]):
    """A frozen y = W x + b with a quantized W, whose tensors are buffers. ``weight`` is W,
    dequantized on each access."""

    bias: Tensor | None

    def __init__(self, weight: W, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self._form: Any = type(weight)
        for name, value in weight._asdict().items():
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @property
    def quantized(self) -> W:
        found: W = self._form(*(getattr(self, name) for name in self._form._fields))
        return found

    @property
    def weight(self) -> Tensor:
        return self.quantized.dense(self.dtype)
