"""LoRA as loralib has it: layers to build a model from, by torch's own names plus ``r``.

They take loralib's arguments, hold its parameters under its names and shapes, and read and write
its checkpoints. To adapt a model that exists already, see ``lorakit.inject``.
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
