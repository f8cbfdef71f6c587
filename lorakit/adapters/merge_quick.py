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

import torch
from torch import Tensor, nn

from lorakit.adapters.checkpoint import Checkpoint
from lorakit.adapters.files import AdapterFiles
from lorakit.adapters.merge_plan import Held
from lorakit.adapters.peft_config import matched_modules
from lorakit.adapters.weighted import Update, Weighted
from lorakit.errors import AdapterError
from lorakit.layers import AdapterLayer, FusedLayer
from lorakit.methods.base import Method
from lorakit.methods.lora import Lora

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

_Layers = dict[str, AdapterLayer | FusedLayer]


def held_by_name(
    settings: Mapping[str, Any], checkpoint: Checkpoint, adapters: Sequence[Weighted]
) -> Held | None:
    """``settings`` is the base's ``config.json``. None where only the class can tell.

    Raises AdapterError for factors that do not fit the base's matrices."""
    own = PLAIN.get(str(settings.get("model_type")))
    if own is None or settings.get("architectures") != [own[0]] or "auto_map" in settings:
        return None
    model = _skeleton(settings, checkpoint)
    if model is None:
        return None
    updates: dict[str, list[Update]] = {}
    for adapter in adapters:
        layers = _layers(model, adapter.files)
        if layers is None:
            return None
        for name, layer in layers.items():
            updates.setdefault(f"{name}.weight", []).append(Update(layer, adapter.weight))
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


def _skeleton(settings: Mapping[str, Any], checkpoint: Checkpoint) -> nn.Module | None:
    """Modules without values by the names of the checkpoint. None if that is not a plain decoder's:
    all its layers, each with the same tensors, an embedding, and the head if it is stored."""
    layers: dict[int, set[str]] = {}
    root = nn.Module()
    for name, stored in checkpoint.tensors.items():
        module, _, end = name.rpartition(".")
        layer = _LAYER.match(name)
        if layer is not None:
            layers.setdefault(int(layer[1]), set()).add(layer[2])
        elif module not in (_EMBEDDING, _HEAD, "model.norm"):
            return None
        if _LEGACY.search(name) or end not in ("weight", "bias") or len(stored.shape) > 2:
            return None
        if end == "weight" and len(stored.shape) == 2 and module != _HEAD:
            _put(root, module, stored.shape)
    count = settings.get("num_hidden_layers")
    alike = len({frozenset(ends) for ends in layers.values()}) == 1
    embedding = checkpoint.tensors.get(f"{_EMBEDDING}.weight")
    if not alike or set(layers) != set(range(count if isinstance(count, int) else 0)):
        return None
    if embedding is None:
        return None
    _put(root, _HEAD, embedding.shape)
    return root


def _put(root: nn.Module, name: str, shape: Sequence[int]) -> None:
    parent = root
    *above, last = name.split(".")
    for part in above:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    rows, columns = shape
    if name == _EMBEDDING:
        module: nn.Module = nn.Embedding(rows, columns, device="meta", _weight=_empty(shape))
    else:
        module = nn.Linear(columns, rows, bias=False, device="meta")
    parent.add_module(last, module)


def _empty(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), device="meta")


def _layers(model: nn.Module, files: AdapterFiles) -> _Layers | None:
    """Module -> its layer. None unless the adapter has factors for linear layers inside of the
    decoder alone, and for every one that its configuration names."""
    config = files.config
    if files.classifies or config.get("modules_to_save"):
        return None
    if not isinstance(files.method, Lora) or type(files.method).link is not Method.link:
        return None
    if config.get("bias") not in (None, "none"):
        return None
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in files.tensors.items():
        name, end = _split(key, modules)
        if not isinstance(modules.get(name), nn.Linear) or name == _HEAD or "base_layer" in end:
            return None
        tensors.setdefault(name, {})[end] = value
    matched = matched_modules(config, model) & set(modules)
    if matched - set(tensors):
        return None
    method, parts = files.method, files.parts
    layers: _Layers = {}
    for name, own in tensors.items():
        try:
            layer = method.from_peft(modules[name], name, config, own)
            layers[name] = method.split(layer, parts[name]) if name in parts else layer
        except AdapterError as error:
            raise AdapterError(f"{files.directory}: {error}") from error
    return layers


def _split(key: str, modules: Iterable[str]) -> tuple[str, str]:
    """The module that a tensor's name begins with, and the rest."""
    parts = key.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        if (name := ".".join(parts[:depth])) in modules:
            return name, ".".join(parts[depth:])
    return "", key
