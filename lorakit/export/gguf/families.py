"""The architectures that are written as GGUF, and how llama.cpp stores their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorakit.errors import ModelError


@dataclass(frozen=True)
class Family:
    """``arch`` is llama.cpp's name of the architecture, ``activation`` the only one it computes.

    ``rotates_pairs``: RoPE turns the features 2i and 2i + 1 of a head, where transformers turns i
    and i + d/2, so that the rows of q and k are stored in another order. ``norm_offset`` is added
    to the weights of norms, which compute (1 + w) x in transformers. ``full_every``: each of so
    many layers has full attention, the others a sliding window. ``largest_layers`` is the number of
    layers of the one size whose attention is scaled by hidden_size / heads instead of head_dim.
    """

    arch: str
    activation: str = "silu"
    rotates_pairs: bool = False
    norm_offset: float = 0.0
    full_every: int | None = None
    largest_layers: int | None = None


_GELU = "gelu_pytorch_tanh"
_LLAMA = Family("llama", rotates_pairs=True)
#: transformers' model type -> the family.
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", _GELU, norm_offset=1.0, full_every=2, largest_layers=46),
    "gemma3_text": Family("gemma3", _GELU, norm_offset=1.0, full_every=6, largest_layers=62),
}
_NAMES = "llama (also SmolLM2), mistral, qwen2 (also Qwen2.5), qwen3, gemma2, gemma3_text"
_HEADS = re.compile(r"\.([qk])_proj\.(?:weight|bias)$")


def family_of(config: Mapping[str, Any], name: str) -> Family:
    """The family of a model by its configuration. Raises ModelError for an unsupported one."""
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise ModelError(
            f"{name}: model_type = {model_type}: cannot be written as GGUF; allowed: {_NAMES}"
        )
    return FAMILIES[model_type]


def stored_rows(family: Family, config: Mapping[str, Any], tensor: str, value: Tensor) -> Tensor:
    """The rows of ``value`` in llama.cpp's order: a weight or bias that transformers names
    ``tensor``, or ``lora_B`` of that weight."""
    found = _HEADS.search(tensor)
    if not (family.rotates_pairs and found):
        return value
    heads = int(config["num_attention_heads"])
    if found[1] == "k":
        heads = int(config.get("num_key_value_heads") or heads)
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def stored_values(family: Family, config: Mapping[str, Any], tensor: str, value: Tensor) -> Tensor:
    """A tensor of the model as llama.cpp stores it."""
    if family.norm_offset and tensor.endswith("norm.weight"):
        return value.float() + family.norm_offset
    return stored_rows(family, config, tensor, value)
