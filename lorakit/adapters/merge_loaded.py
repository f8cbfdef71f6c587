"""The merge of a model whose checkpoint has other names or shapes than the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lorakit.adapters.base_model import base_model, set_pad_token
from lorakit.adapters.merge_plan import check_finite, part_embeddings
from lorakit.adapters.place import find_places
from lorakit.adapters.weighted import Update, Weighted, find_updates, merged_sum
from lorakit.layers import adapted_modules
from lorakit.models.load import quiet
from lorakit.models.masters import set_value
from lorakit.recipe.sections import ModelSection


def merge_loaded(
    section: ModelSection,
    config: PreTrainedConfig,
    adapters: Sequence[Weighted],
    folder: Path,
    dtype: str | None,
    max_shard_bytes: int,
) -> dict[str, Any]:
    """Load the base, fold the adapters in, save it in ``folder``. Each matrix is summed in float32
    and rounded once; what is trained whole is the first adapter's. Returns the fields of a
    MergeReport."""
    files = adapters[0].files
    model, _ = base_model(section, config, [files], None)
    set_pad_token(model.config, model, files)
    target = getattr(torch, dtype) if dtype else model.dtype
    updates = find_updates(model, adapters)
    _fold(model, updates, target)
    nn.Module.to(model, target)
    places = find_places(model, files)
    for name, value in places.base.items():  # again: what the base's dtype took is not lost
        if name.removesuffix(".weight") not in updates:
            set_value(model, name, value)
    for name, value in model.state_dict().items():
        check_finite(name, value)
    if _embeddings_parted(model):
        part_embeddings(model.config)
    with quiet():
        model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    written = sorted(folder.glob("*.safetensors"))
    return {
        "files": tuple(file.name for file in written),
        "merged_modules": len(updates),
        "replaced_tensors": len(places.base) + len(places.whole),
        "dtype": str(target).removeprefix("torch."),
        "size_bytes": sum(file.stat().st_size for file in written),
    }


def fold(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Fold every adapter layer into its base, in place, in ``dtype`` (default: the base's own).

    A weight that is shared gets its own memory. Returns the number of modules.
    """
    layers = adapted_modules(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)
    _fold(model, {name: [Update(layer)] for name, layer in layers.items()}, dtype)
    return len(layers)


@torch.no_grad()
def _fold(
    model: nn.Module, updates: Mapping[str, Sequence[Update]], dtype: torch.dtype | None
) -> None:
    for name, found in updates.items():
        module: Any = model.get_submodule(name)
        weight = merged_sum(found, module.weight)
        module.weight = nn.Parameter(weight.to(dtype or module.weight.dtype), requires_grad=False)


def _embeddings_parted(model: PreTrainedModel) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is not model.get_input_embeddings().weight
