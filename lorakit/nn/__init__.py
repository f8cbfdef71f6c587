"""A drop-in replacement for loralib: torch layers with a low-rank update built in.

They have loralib's arguments, parameter names and shapes, and read and write its checkpoints. To
adapt an existing model, use ``lorakit.inject``. A new layer derives from ``LoraMixin`` and a torch
class, and defines ``delta_weight``, ``reset_factors`` and ``forward``.
"""

from lorakit.nn.base import lora_state_dict, mark_only_lora_as_trainable
from lorakit.nn.layers import Conv2d, Embedding, Linear, MergedLinear

__all__ = [
    "Conv2d",
    "Embedding",
    "Linear",
    "MergedLinear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]
