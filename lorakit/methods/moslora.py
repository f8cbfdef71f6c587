"""MoSLoRA (Wu et al. 2024, arXiv 2406.11909): y = W x + (lora_alpha / r) B M A dropout(x).

W (out, in), A (r, in) and B (out, r) are those of LoRA. The mixer M (r, r), which is trained too,
combines every column of B with every row of A; it is initialized orthogonal, which preserves the
norm of A x. An adapter is saved as a plain LoRA, with M A as A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorakit.methods.lora import Lora, LoraConfig
from lorakit.recipe.sections import AdapterSection

if TYPE_CHECKING:
    from lorakit.methods.lora_layer import LoraLayer


class MosLoraConfig(LoraConfig):
    """The keys of LoRA. ``init`` must leave one factor zero, or B M A would change the output."""

    method: str = "moslora"
    init: Literal["default", "b_gaussian"] = "default"
    """default: A random, B zero. b_gaussian: A zero, B random."""


class MosLora(Lora):
    name = "moslora"
    summary = "LoRA with a trained mixer: B M A"
    source = "Wu et al. 2024"
    arxiv = "2406.11909"
    Config: ClassVar[type[AdapterSection]] = MosLoraConfig
    kinds = Lora.kinds - {"parameter"}
    folds = True

    def layer_class(self) -> type[LoraLayer]:
        from lorakit.methods.lora_layer import MosLoraLayer

        return MosLoraLayer

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """False, since its adapters are saved as plain LoRA."""
        return False


METHOD = MosLora()
