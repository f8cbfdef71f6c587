"""What a base holds, read from its files alone, where that is certain.

For the common decoders transformers reads every tensor under its own name into plain linear
layers, so an adapter's modules are found in the checkpoint, and neither transformers' classes nor
a model need to be made: seconds of every merge. Whatever is not certain is left to
``held_by_class``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lorakit.adapters.checkpoint import Checkpoint
from lorakit.adapters.files import AdapterFiles, split_key
from lorakit.adapters.held import Held
from lorakit.adapters.peft_config import is_targeted
from lorakit.adapters.plain_decoders import EMBEDDING, HEAD, PLAIN, PlainDecoder
from lorakit.adapters.weighted import LowRank, Weighted, adds_product
from lorakit.errors import AdapterError
from lorakit.methods.base import Method
from lorakit.methods.lora import Lora
from lorakit.methods.lora_form import peft_rank, peft_scaling


def held_by_name(
    settings: Mapping[str, Any], checkpoint: Checkpoint, adapters: Sequence[Weighted]
) -> Held | None:
    """``settings`` is the base's ``config.json``. None where only the class can tell, or say what
    does not fit."""
    decoder = PLAIN.get(str(settings.get("model_type")))
    if decoder is None or settings.get("architectures") != [decoder.class_name]:
        return None
    if "auto_map" in settings:
        return None
    matrices = _matrices(decoder, settings, checkpoint)
    if matrices is None:
        return None
    updates: dict[str, list[LowRank]] = {}
    for adapter in adapters:
        products = _products(matrices, adapter)
        if products is None:
            return None
        for name, product in products.items():
            updates.setdefault(f"{name}.weight", []).append(product)
    names = [f"{HEAD}.weight", f"{EMBEDDING}.weight"]
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    return Held(
        plain={name: name for name in checkpoint.tensors},
        shapes=shapes,
        ties=[names] if decoder.is_tied(settings) else [],
        updates=updates,
        class_name=decoder.class_name,
    )


def _matrices(
    decoder: PlainDecoder, settings: Mapping[str, Any], checkpoint: Checkpoint
) -> dict[str, tuple[int, ...]] | None:
    """Module -> the shape of its matrix. None unless the checkpoint holds what the class does,
    tensor by tensor; an output layer that is tied may be stored or not."""
    shapes = decoder.shapes(settings)
    if shapes is None:
        return None
    stored = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    head = f"{HEAD}.weight"
    if decoder.is_tied(settings):
        stored.setdefault(head, shapes[head])
    if stored != shapes:
        return None
    return {n.removesuffix(".weight"): shape for n, shape in shapes.items() if len(shape) == 2}


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
        name, end = split_key(key, matrices)
        if name in ("", EMBEDDING, HEAD) or end not in ("lora_A.weight", "lora_B.weight"):
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
