"""An adapter folded into a model in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorakit.adapters.weighted import Update, merged_sum
from lorakit.layers import adapted_modules


@torch.no_grad()
def fold(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Fold every adapter layer into its base, in place, in ``dtype`` (default: the base's own).

    A weight that is shared gets its own memory. Returns the number of modules.
    """
    layers = adapted_modules(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)
        module: Any = layer.base_layer
        weight = merged_sum([Update(layer)], module.weight)
        module.weight = nn.Parameter(weight.to(dtype or module.weight.dtype), requires_grad=False)
    return len(layers)
