"""DoRA (Liu et al. 2024, arXiv 2402.09353, section 4.1): W' = m * (W + s B A) / ||W + s B A||.

W (out, in) is frozen, A (r, in) and B (out, r) are LoRA's, s its scaling; the norm is that of each
row, and the magnitudes m (out,) start as it. The norm is a constant in the backward pass (section
4.3). An embedding's rows count as those of W^T: one magnitude a dimension. As PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.methods.lora import Lora, LoraConfig
from lorakit.recipe.sections import AdapterSection

if TYPE_CHECKING:
    from lorakit.methods.lora_layer import LoraLayer


class DoraConfig(LoraConfig):
    """LoRA's keys. ``lora_dropout`` drops from the input of all that DoRA adds to W x + b, which
    is (m / norm - 1) W dropout(x) besides the low-rank part: a second product with W a step."""

    method: str = "dora"


class Dora(Lora):
    name = "dora"
    summary = "W' = m * (W + s B A) / ||W + s B A||, each row's m trained (Liu et al. 2024)"
    Config: ClassVar[type[AdapterSection]] = DoraConfig

    def layer_class(self) -> type[LoraLayer]:
        from lorakit.methods.dora_layer import DoraLayer

        return DoraLayer

    def reads(self, settings: Mapping[str, Any]) -> bool:
        return settings["peft_type"] == "LORA" and bool(settings.get("use_dora"))


METHOD = Dora()
