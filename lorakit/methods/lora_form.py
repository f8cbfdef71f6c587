"""The adapted parts of a fused projection as one LoRA layer on all of it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorakit.errors import AdapterError

if TYPE_CHECKING:
    from lorakit.layers import AdapterLayer, FusedLayer, RowSlice
    from lorakit.methods.lora import Lora


def rank_of(layer: AdapterLayer) -> int:
    """The rank of the update as it is saved: ``pissa`` has its start beside it."""
    return layer.r * (2 if hasattr(layer, "initial_A") else 1)


def compose(method: Lora, fused: FusedLayer) -> AdapterLayer:
    """The A of the parts one below the other, each B in its own rows and columns, zero elsewhere:
    exactly the same update, of the parts' ranks together, as a layer of ``method``."""
    import torch

    from lorakit.layers import AdapterLayer

    parts: dict[str, Any] = fused.parts
    factors = {role: part.method.factors(part) for role, part in parts.items()}
    A = torch.cat([a.detach() for a, _ in factors.values()])
    scaling = next(iter(parts.values())).scaling
    layer = AdapterLayer(fused.base_layer, method, r=len(A), scaling=scaling)
    B = A.new_zeros(layer.out_features, layer.r)
    at = 0
    for role, (_, own) in factors.items():
        columns = B[:, at : at + own.shape[1]]
        fused.rows(role).put(columns, own.detach() * (parts[role].scaling / scaling))
        at += own.shape[1]
    layer.lora_A = torch.nn.Parameter(A, requires_grad=False)
    layer.lora_B = torch.nn.Parameter(B, requires_grad=False)
    layer.lora_dropout = next(iter(parts.values())).lora_dropout
    return layer


def split(
    method: Lora, layer: AdapterLayer, parts: Mapping[str, tuple[RowSlice, int]]
) -> FusedLayer:
    """The parts, role -> (rows, r), of what ``compose`` made. Raises AdapterError if they do not
    fit, or if it has values outside of them."""
    import torch

    from lorakit.layers import AdapterLayer, FusedLayer, RowsOf

    found, at = {}, 0
    rest = layer.lora_B.detach().clone()
    for role, (rows, r) in parts.items():
        if not rows.fit(layer.out_features):
            raise AdapterError(f"the part {role}, {rows}, does not fit {layer.out_features} rows")
        part = AdapterLayer(RowsOf(layer.base_layer, rows), method, r=r, scaling=layer.scaling)
        columns = slice(at, at + r)
        factors = {"lora_A": layer.lora_A[columns], "lora_B": rows.of(layer.lora_B[:, columns])}
        for factor, value in factors.items():
            own = torch.nn.Parameter(value.detach().clone(), requires_grad=False)
            part.register_parameter(factor, own)
        part.lora_dropout = layer.lora_dropout
        rows.put(rest[:, columns], torch.zeros_like(part.lora_B))
        found[role] = part
        at += r
    if at != layer.r or rest.any():
        raise AdapterError(f"the parts {', '.join(parts)} are not all that the tensors hold")
    return FusedLayer(layer.base_layer, found)
