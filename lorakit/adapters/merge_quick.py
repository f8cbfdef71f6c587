"""What a base holds, told from its files alone, where that is certain.

For the common decoders transformers reads every tensor under its own name into plain linear
layers, so an adapter's modules are found in the checkpoint, and neither transformers' classes nor
a model need to be made: seconds of every merge. Whatever is not certain is left to
``held_by_class``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lorakit.adapters.checkpoint import Checkpoint
from lorakit.adapters.files import AdapterFiles
from lorakit.adapters.held import Held
from lorakit.adapters.peft_config import is_targeted
from lorakit.adapters.weighted import LowRank, Weighted, adds_product
from lorakit.errors import AdapterError
from lorakit.methods.base import Method
from lorakit.methods.lora import Lora
from lorakit.methods.lora_form import peft_rank, peft_scaling

#: model_type -> the class, and whether its embeddings are tied where config.json does not say so.
#: Of these transformers converts nothing, and every matrix but the embedding is an nn.Linear.
PLAIN = {
    "arcee": ("ArceeForCausalLM", False),
    "cohere": ("CohereForCausalLM", True),
    "cohere2": ("Cohere2ForCausalLM", True),
    "ernie4_5": ("Ernie4_5ForCausalLM", True),
    "gemma": ("GemmaForCausalLM", True),
    "gemma2": ("Gemma2ForCausalLM", True),
    "gemma3_text": ("Gemma3ForCausalLM", True),
    "granite": ("GraniteForCausalLM", False),
    "llama": ("LlamaForCausalLM", False),
    "ministral3": ("Ministral3ForCausalLM", False),
    "mistral": ("MistralForCausalLM", False),
    "nemotron": ("NemotronForCausalLM", False),
    "olmo": ("OlmoForCausalLM", False),
    "olmo2": ("Olmo2ForCausalLM", False),
    "olmo3": ("Olmo3ForCausalLM", False),
    "qwen2": ("Qwen2ForCausalLM", False),
    "qwen3": ("Qwen3ForCausalLM", False),
    "seed_oss": ("SeedOssForCausalLM", False),
    "stablelm": ("StableLmForCausalLM", False),
    "starcoder2": ("Starcoder2ForCausalLM", True),
}
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
#: What transformers renames in the checkpoints of any model.
_LEGACY = re.compile(r"LayerNorm\.(?:gamma|beta)|weight_[gv]$|parametrizations")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


def held_by_name(
    settings: Mapping[str, Any], checkpoint: Checkpoint, adapters: Sequence[Weighted]
) -> Held | None:
    """``settings`` is the base's ``config.json``. None where only the class can tell, or say what
    does not fit."""
    own = PLAIN.get(str(settings.get("model_type")))
    if own is None or settings.get("architectures") != [own[0]] or "auto_map" in settings:
        return None
    matrices = _matrices(settings, checkpoint)
    if matrices is None:
        return None
    updates: dict[str, list[LowRank]] = {}
    for adapter in adapters:
        products = _products(matrices, adapter)
        if products is None:
            return None
        for name, product in products.items():
            updates.setdefault(f"{name}.weight", []).append(product)
    names = [f"{_HEAD}.weight", f"{_EMBEDDING}.weight"]
    tied = bool(settings.get("tie_word_embeddings", own[1]))
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    return Held(
        plain={name: name for name in checkpoint.tensors},
        shapes=shapes,
        ties=[names] if tied else [],
        updates=updates,
        class_name=own[0],
    )


def _matrices(
    settings: Mapping[str, Any], checkpoint: Checkpoint
) -> dict[str, tuple[int, ...]] | None:
    """Module -> the shape of its matrix. None if the checkpoint is not a plain decoder's: all its
    layers, each with the same tensors, an embedding, and the head if it is stored."""
    layers: dict[int, set[str]] = {}
    matrices: dict[str, tuple[int, ...]] = {}
    for name, stored in checkpoint.tensors.items():
        module, _, end = name.rpartition(".")
        layer = _LAYER.match(name)
        if layer is not None:
            layers.setdefault(int(layer[1]), set()).add(layer[2])
        elif module not in (_EMBEDDING, _HEAD, "model.norm"):
            return None
        if _LEGACY.search(name) or end not in ("weight", "bias") or len(stored.shape) > 2:
            return None
        if end == "weight" and len(stored.shape) == 2:
            matrices[module] = stored.shape
    count = settings.get("num_hidden_layers")
    alike = len({frozenset(ends) for ends in layers.values()}) == 1
    whole = set(layers) == set(range(count if isinstance(count, int) else 0))
    if not alike or not whole or _EMBEDDING not in matrices:
        return None
    return {_HEAD: matrices[_EMBEDDING]} | matrices


def _products(
    matrices: Mapping[str, tuple[int, ...]], adapter: Weighted
) -> dict[str, LowRank] | None:
    """Module -> its update. None unless the adapter has LoRA factors for linear layers inside of
    the decoder alone, and for every one that its configuration names."""
    files = adapter.files
    if not _is_plain_lora(files):
        return None
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in files.tensors.items():
        name, end = _split(key, matrices)
        if name in ("", _EMBEDDING, _HEAD) or end not in ("lora_A.weight", "lora_B.weight"):
            return None
        factors.setdefault(name, {})[end] = value
    if {name for name in matrices if is_targeted(files.config, name)} - set(factors):
        return None
    products = {}
    for name, own in factors.items():
        product = _product(name, own, matrices[name], adapter)
        if product is None:
            return None
        products[name] = product
    return products


def _is_plain_lora(files: AdapterFiles) -> bool:
    method, config = files.method, files.config
    return (
        not files.classifies
        and adds_product(method)
        and type(method).from_peft is Lora.from_peft
        and type(method).link is Method.link
        and not config.get("modules_to_save")
        and config.get("bias") in (None, "none")
        and config.get("target_modules") != "all-linear"
    )


def _product(
    name: str, factors: Mapping[str, Tensor], shape: Sequence[int], adapter: Weighted
) -> LowRank | None:
    config = adapter.files.config
    A, B = factors.get("lora_A.weight"), factors.get("lora_B.weight")
    if A is None or B is None or name in adapter.files.parts:
        return None
    r = peft_rank(config, name)
    if (tuple(A.shape), tuple(B.shape)) != ((r, shape[1]), (shape[0], r)):
        return None
    try:
        scaling = peft_scaling(config, name, r)
    except AdapterError:
        return None
    return LowRank(B, A, scaling, adapter.weight)


def _split(key: str, modules: Iterable[str]) -> tuple[str, str]:
    """The module that a tensor's name begins with, and the rest."""
    parts = key.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        if (name := ".".join(parts[:depth])) in modules:
            return name, ".".join(parts[depth:])
    return "", key
