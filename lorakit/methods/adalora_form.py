"""The kept triplets of an AdaLoRA layer as plain LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.methods.adalora import kept_rows
from lorakit.methods.lora import METHOD as LORA

if TYPE_CHECKING:
    from lorakit.layers import AdapterLayer, FusedLayer


def fold(layer: AdapterLayer) -> AdapterLayer:
    """A plain LoRA of the kept triplets: A' = Lambda Q, B' = P, the same scaling."""
    import torch

    from lorakit.layers import AdapterLayer

    rows = kept_rows(layer)
    folded = AdapterLayer(layer.base_layer, LORA, r=len(rows), scaling=layer.scaling)
    A = (layer.lora_A * layer.lora_E).detach()[rows]
    folded.lora_A = torch.nn.Parameter(A, requires_grad=False)
    folded.lora_B = torch.nn.Parameter(layer.lora_B.detach()[:, rows], requires_grad=False)
    folded.lora_dropout = layer.lora_dropout
    return folded


def compose_as_lora(fused: FusedLayer) -> AdapterLayer:
    from lorakit.layers import FusedLayer

    folded = {role: fold(part) for role, part in fused.parts.items()}
    return LORA.compose(FusedLayer(fused.base_layer, folded))
