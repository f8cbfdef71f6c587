"""A user's method, which tests change."""

from __future__ import annotations

METHOD = """
from pydantic import field_validator
from torch import nn
from lorakit.layers import AdapterLayer
from lorakit.methods.base import Method
from lorakit.recipe.sections import AdapterSection

class Config(AdapterSection):
    size: int = 2

class Layer(AdapterLayer):
    def __init__(self, base_layer, config, name):
        super().__init__(base_layer)
        self.scales = self.new_parameter(self.out_features)
        nn.init.zeros_(self.scales)

    def delta_weight(self):
        return self.scales[:, None] * self.dense_weight()

class Own(Method):
    Config = Config
    Layer = Layer
"""
