"""lorakit: low-rank adapters from one recipe.

The public names are loaded when they are first asked for, so that ``import lorakit`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.adapters.convert import convert
    from lorakit.adapters.load import load
    from lorakit.adapters.merge.run import merge
    from lorakit.adapters.switching import switch
    from lorakit.api import evaluate
    from lorakit.injection import inject
    from lorakit.methods.lora import LoraConfig
    from lorakit.nn import (
        Conv2d,
        Embedding,
        Linear,
        MergedLinear,
        lora_state_dict,
        mark_only_lora_as_trainable,
    )
    from lorakit.recipe.load import load_recipe
    from lorakit.training.run import train

__version__ = "0.1.0"

__all__ = [
    "Conv2d",
    "Embedding",
    "Linear",
    "LoraConfig",
    "MergedLinear",
    "convert",
    "evaluate",
    "inject",
    "load",
    "load_recipe",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "nn",
    "switch",
    "train",
]

_HOMES = {
    "Conv2d": "lorakit.nn",
    "Embedding": "lorakit.nn",
    "Linear": "lorakit.nn",
    "LoraConfig": "lorakit.methods.lora",
    "MergedLinear": "lorakit.nn",
    "convert": "lorakit.adapters.convert",
    "evaluate": "lorakit.api",
    "inject": "lorakit.injection",
    "load": "lorakit.adapters.load",
    "load_recipe": "lorakit.recipe.load",
    "lora_state_dict": "lorakit.nn",
    "mark_only_lora_as_trainable": "lorakit.nn",
    "merge": "lorakit.adapters.merge.run",
    "switch": "lorakit.adapters.switching",
    "train": "lorakit.training.run",
}


def __getattr__(name: str) -> Any:
    if name == "nn":
        return import_module("lorakit.nn")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
