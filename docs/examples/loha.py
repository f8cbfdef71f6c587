"""LoHa: an update that is the elementwise product of two low-rank products.

Hyeon-Woo et al. 2022 (FedPara, arXiv 2108.06098, section 2.2) and Yeh et al. 2024 (LyCORIS,
arXiv 2309.14859):

    y = W x + b + (alpha / r) * ((A_1 B_1) * (A_2 B_2)) x

W (out, in) is frozen; A_1, A_2 (out, r) and B_1, B_2 (r, in) are trained. The product of two
matrices of rank r has a rank of up to r^2. Keys and parameters have PEFT's names, so that PEFT
loads the adapter as ``LOHA``.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from lorakit.layers import AdapterLayer
from lorakit.methods.base import Method
from lorakit.recipe.sections import AdapterSection, LoraAlpha, Rank


class LoHaConfig(AdapterSection):
    """``r`` is the rank of each product, ``alpha`` / r scales the update."""

    r: Rank = 8
    alpha: LoraAlpha = 8


class LoHaLayer(AdapterLayer):
    """B_2 starts at zero, which leaves the output unchanged."""

    def __init__(self, base_layer: nn.Module, config: LoHaConfig, name: str) -> None:
        super().__init__(base_layer, r=config.r, scaling=config.alpha / config.r)
        out_features, in_features = self.base_shape
        self.hada_w1_a = self.new_parameter(out_features, config.r)
        self.hada_w1_b = self.new_parameter(config.r, in_features)
        self.hada_w2_a = self.new_parameter(out_features, config.r)
        self.hada_w2_b = self.new_parameter(config.r, in_features)
        for factor in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        nn.init.zeros_(self.hada_w2_b)

    def delta_weight(self) -> Tensor:
        first = self.hada_w1_a @ self.hada_w1_b
        second = self.hada_w2_a @ self.hada_w2_b
        return first * second * self.scaling


class LoHa(Method):
    summary = "W + (alpha / r) (A_1 B_1) * (A_2 B_2), elementwise (Hyeon-Woo et al. 2022)"
    Config = LoHaConfig
    Layer = LoHaLayer
    kinds = frozenset({"linear"})  # PEFT's LoHa does not adapt Conv1D
    peft_type = "LOHA"
    peft_loads = True
