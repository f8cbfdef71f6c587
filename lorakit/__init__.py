"""Low-rank adapters (LoRA and related methods) trained from one recipe.

Public names are imported on first use, so ``import lorakit`` loads no tensor library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorakit.version import __version__ as __version__

if TYPE_CHECKING:
    from lorakit import nn
    from lorakit.api import (
        Conv2d,
        Embedding,
        Linear,
        LoraConfig,
        MergedLinear,
        check_vllm,
        compare,
        convert,
        evaluate,
        export_gguf,
        init_recipe,
        inject,
        inspect,
        load,
        load_recipe,
        load_with_tokenizer,
        lora_state_dict,
        mark_only_lora_as_trainable,
        merge,
        plan,
        predict,
        push_to_hub,
        report,
        sweep,
        switch,
        train,
    )

__all__ = [
    "Conv2d",
    "Embedding",
    "Linear",
    "LoraConfig",
    "MergedLinear",
    "check_vllm",
    "compare",
    "convert",
    "evaluate",
    "export_gguf",
    "init_recipe",
    "inject",
    "inspect",
    "load",
    "load_recipe",
    "load_with_tokenizer",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "nn",
    "plan",
    "predict",
    "push_to_hub",
    "report",
    "sweep",
    "switch",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "nn":
        return import_module("lorakit.nn")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("lorakit.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
