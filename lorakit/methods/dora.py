"""DoRA (Liu et al. 2024, arXiv 2402.09353, section 4.1): W' = m * (W + s B A) / ||W + s B A||.

W (out, in) is frozen, A (r, in), B (out, r) and the scaling s are those of LoRA. The norm is taken
of each row; the magnitudes m (out,) are initialized with it. It is a constant in the backward pass
(section 4.3). An embedding has one magnitude for each dimension. All this is as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.methods.lora import Lora, LoraConfig
from lorakit.recipe.sections import AdapterSection

if TYPE_CHECKING:
    from lorakit.methods.lora_layer import LoraLayer


class DoraConfig(LoraConfig):
    """The keys of LoRA. ``lora_dropout`` applies to the input of every term added to W x + b. This
    includes (m / norm - 1) W dropout(x), which requires a second product with W in each step."""

    method: str = "dora"


class Dora(Lora):
    name = "dora"
    summary = "rows of W + s B A rescaled to m"
    source = "Liu et al. 2024"
    arxiv = "2402.09353"
    Config: ClassVar[type[AdapterSection]] = DoraConfig
    kinds = Lora.kinds - {"parameter"}

    def layer_class(self) -> type[LoraLayer]:
        from lorakit.methods.dora_layer import DoraLayer

        return DoraLayer

    def reads(self, settings: Mapping[str, Any]) -> bool:
        return settings["peft_type"] == "LORA" and bool(settings.get("use_dora"))


METHOD = Dora()
