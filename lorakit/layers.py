"""The module that stands in place of an adapted one; the method gives it its mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.kernels.low_rank import RowSlice as RowSlice

if TYPE_CHECKING:
    from lorakit.methods.base import Method

Kind = Literal["linear", "conv1d", "embedding"]
#: What can be adapted. Conv1D is GPT-2's linear layer with a weight of (in_features, out_features).
ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)


class RowsOf(nn.Module):
    """RowSlice of a fused projection, looked at as a linear layer of their own; it owns nothing."""

    def __init__(self, whole: nn.Module, rows: RowSlice) -> None:
        super().__init__()
        self._whole = (whole,)  # in a tuple: its parameters are not listed twice
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        """(rows, in_features)"""
        weight = self._whole[0].weight
        assert isinstance(weight, Tensor)
        return self.rows.of(as_matrix(self._whole[0], weight))

    @property
    def bias(self) -> Tensor | None:
        bias = self._whole[0].bias
        return self.rows.of(bias) if isinstance(bias, Tensor) else None


class _InPlace(nn.Module):
    """What stands in place of ``base_layer``, a frozen y = W x + b.

    ``in_features`` and ``out_features`` are W's; for an embedding they are the number of rows and
    the dimension.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        shape = as_matrix(base_layer, self.weight).shape
        self.out_features, self.in_features = int(shape[0]), int(shape[1])

    @property
    def weight(self) -> Tensor:
        """The frozen W: some models look at its dtype or device."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.base_layer, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias


class AdapterLayer(_InPlace):
    """Beside the base the parameters that a method registers. ``r`` is the rank and ``scaling`` the
    factor of the update."""

    def __init__(self, base_layer: nn.Module, method: Method, *, r: int, scaling: float) -> None:
        assert isinstance(base_layer, (*ADAPTABLE, RowsOf)), type(base_layer)
        super().__init__(base_layer)
        self.method = method
        self.r = r
        self.scaling = scaling
        self.kind = kind_of(base_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.forward(self, x)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W with the adapter folded in, float32; ``weight`` is W, in its own layout."""
        return self.method.merged_weight(self, weight)

    if TYPE_CHECKING:  # what the method registers: lora_A, lora_B, ...

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

    def extra_repr(self) -> str:
        return f"{self.method.name}, r={self.r}, scaling={self.scaling:g}"


class FusedLayer(_InPlace):
    """A projection that holds q, k and v in one matrix, some of them adapted.

    Each part, a child under its role's name, is an AdapterLayer on its own rows; what the other
    rows give is the base's, bit for bit.
    """

    def __init__(self, base_layer: nn.Module, parts: Mapping[str, AdapterLayer]) -> None:
        super().__init__(base_layer)
        for role, part in parts.items():
            self.add_module(role, part)

    @property
    def parts(self) -> dict[str, AdapterLayer]:
        """Role -> part, in the order of their rows."""
        found = {n: m for n, m in self.named_children() if isinstance(m, AdapterLayer)}
        return dict(sorted(found.items(), key=lambda item: self.rows(item[0]).start))

    def rows(self, role: str) -> RowSlice:
        part = getattr(self, role)
        rows = part.base_layer.rows
        assert isinstance(rows, RowSlice)
        return rows

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        parts = self.parts
        period = self.rows(next(iter(parts))).period
        y = self.base_layer(flat).view(len(flat), self.out_features // period, period)
        pieces, at = [], 0
        for role, part in parts.items():
            rows = self.rows(role)
            own = y[..., rows.start : rows.stop]
            updated = part.method.update(part, flat, own.flatten(1).contiguous())
            pieces += [y[..., at : rows.start], updated.view(own.shape)]
            at = rows.stop
        whole = torch.cat([*pieces, y[..., at:]], dim=-1)
        return whole.view(*x.shape[:-1], self.out_features)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W with every part folded into its rows, float32, in W's own layout."""
        merged = weight.float().clone()
        matrix = as_matrix(self.base_layer, merged)
        for role, part in self.parts.items():
            rows = self.rows(role)
            own = part.merged_weight(rows.of(as_matrix(self.base_layer, weight)))
            rows.put(matrix, own)
        return merged


def kind_of(module: nn.Module) -> Kind:
    """How ``module`` holds its W; rows of a fused projection are linear, however that holds it."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv1d" if isinstance(module, Conv1D) else "linear"


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """``weight``, laid out as ``module``'s, as (out_features, in_features)."""
    return weight.t() if isinstance(module, Conv1D | nn.Embedding) else weight


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Name -> layer for every adapted matrix of the model, in the model's order; a part of a fused
    projection is named after its role (``h.0.attn.c_attn.q``)."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdapterLayer)}


def adapted_modules(model: nn.Module) -> dict[str, AdapterLayer | FusedLayer]:
    """Name -> what stands in place of a module of the base, in the model's order."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, AdapterLayer | FusedLayer)}
    return {
        name: layer
        for name, layer in found.items()
        if not isinstance(found.get(name.rpartition(".")[0]), FusedLayer)
    }
