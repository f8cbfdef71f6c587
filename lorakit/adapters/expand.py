"""Turns an adapter whose update depends on the base (PiSSA, OLoRA) into a plain LoRA."""

from __future__ import annotations

import dataclasses

from lorakit.adapters.base_model import base_model, base_section, full_config
from lorakit.adapters.peft.initialization import INITIALIZATION
from lorakit.adapters.peft.ranks import exact_settings
from lorakit.adapters.peft.read import AdapterFiles
from lorakit.adapters.peft.schema import factor_names


def expanded(files: AdapterFiles) -> AdapterFiles:
    """Return the plain LoRA of twice the rank with the same update. The base that the adapter names
    is loaded for it. Raises ModelError and AdapterError."""
    from lorakit.adapters.peft.place import load_adapter
    from lorakit.layers import adapter_layers
    from lorakit.methods.lora_layer import LoraLayer

    section = base_section(None, files)
    model, _ = base_model(section, full_config(section, files), [files], "float32")
    load_adapter(model, files)
    tensors = {key: value for key, value in files.tensors.items() if ".lora_" not in key}
    scalings = {}
    for name, layer in adapter_layers(model).items():
        assert isinstance(layer, LoraLayer)
        for end, factor in zip(factor_names(layer.kind), layer.factors(), strict=True):
            tensors[f"{name}.{end}"] = factor.detach()
        scalings[name] = layer.r, layer.scaling
    patterns = exact_settings(scalings, bool(files.config.get("use_rslora")))
    config = files.config | {INITIALIZATION: True} | patterns
    return dataclasses.replace(files, config=config, tensors=tensors)
