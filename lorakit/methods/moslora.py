"""MoSLoRA (Wu et al. 2024, arXiv 2406.11909): y = W x + (lora_alpha / r) B M A dropout(x).

W (out, in), A (r, in) and B (out, r) are LoRA's. The mixer M (r, r), trained too, lets every
column of B meet every row of A; it starts orthogonal, which keeps the size of A x. An adapter is
saved as a plain LoRA, with M A for A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorakit.methods.lora import Lora, LoraConfig, embedding_add
from lorakit.recipe.sections import AdapterSection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer, FusedLayer


class MosLoraConfig(LoraConfig):
    """LoRA's keys. ``init`` must have one factor zero: with others B M A changes the output."""

    method: str = "moslora"
    init: Literal["default", "b_gaussian"] = "default"


class MosLora(Lora):
    name = "moslora"
    summary = "y = W x + (lora_alpha / r) B M A x, M (r, r) a trained mixer (Wu et al. 2024)"
    Config: ClassVar[type[AdapterSection]] = MosLoraConfig
    folds = True

    def wrap(self, module: nn.Module, config: Any, name: str) -> AdapterLayer:
        import torch

        layer = super().wrap(module, config, name)
        layer.lora_mixer = torch.nn.Parameter(layer.lora_A.new_empty(layer.r, layer.r))
        torch.nn.init.orthogonal_(layer.lora_mixer)
        return layer

    def factors(self, layer: AdapterLayer) -> tuple[Tensor, Tensor]:
        """LoRA's A and B of the same update: M A and B."""
        return layer.lora_mixer @ layer.lora_A, layer.lora_B

    def update(self, layer: AdapterLayer, x: Tensor, y: Tensor) -> Tensor:
        """In evaluation as the plain LoRA that is saved: in half precision the mixer by itself
        would be one rounding more, and the metrics not those of the saved adapter."""
        import torch.nn.functional as F

        from lorakit.kernels.low_rank import lora_add_

        if not layer.training:
            return super().update(layer, x, y)
        x = layer.lora_dropout(x)
        h = F.linear(x, layer.lora_A.to(x.dtype))
        return lora_add_(y, h, layer.lora_mixer, layer.lora_B, layer.scaling)

    def embed(self, layer: AdapterLayer, ids: Tensor) -> Tensor:
        """With B M for B in training: M A is as large as the vocabulary."""
        if not layer.training:
            return super().embed(layer, ids)
        B = layer.lora_B @ layer.lora_mixer
        return embedding_add(layer.base_layer(ids), layer, ids, layer.lora_A, B)

    def compose(self, fused: FusedLayer) -> AdapterLayer:
        """A layer of LoRA: the mixers are folded in."""
        from lorakit.methods.lora import METHOD as LORA
        from lorakit.methods.lora_form import compose

        return compose(LORA, fused)

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """What it saves is LoRA's."""
        return False


METHOD = MosLora()
