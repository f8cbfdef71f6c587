"""LoRA as loralib has it: layers to build a model from, by torch's own names plus ``r``.

They take loralib's arguments, hold its parameters under its names and shapes, and read and write
its checkpoints. To adapt a model that exists already, see ``lorakit.inject``.
"""

from lorakit.nn.conv import Conv2d
from lorakit.nn.embedding import Embedding
from lorakit.nn.linear import Linear
from lorakit.nn.marking import lora_state_dict, mark_only_lora_as_trainable
from lorakit.nn.merged_linear import MergedLinear

__all__ = [
    "Conv2d",
    "Embedding",
    "Linear",
    "MergedLinear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]
