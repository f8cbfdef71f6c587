"""The merge of a model whose checkpoint has other names or shapes than the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lorakit.adapters.files import AdapterFiles
from lorakit.adapters.load import base_model
from lorakit.adapters.merge_plan import check_finite, part_embeddings
from lorakit.adapters.place import find_places, load_adapter
from lorakit.layers import adapted_modules
from lorakit.models.load import quiet
from lorakit.models.masters import set_value
from lorakit.recipe.sections import ModelSection


def merge_loaded(
    section: ModelSection,
    config: PreTrainedConfig,
    files: AdapterFiles,
    folder: Path,
    dtype: str | None,
    max_shard_bytes: int,
) -> dict[str, Any]:
    """Load the base, fold the adapter in, save it in ``folder``. Each matrix is summed in float32
    and rounded once. Returns the fields of a MergeReport."""
    model = base_model(section, config, files, None)
    target = getattr(torch, dtype) if dtype else model.dtype
    load_adapter(model, files)
    merged = fold(model, target)
    nn.Module.to(model, target)
    places = find_places(model, files)
    for name, value in places.base.items():  # again: what the base's dtype took is not lost
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
        "merged_modules": merged,
        "replaced_tensors": len(places.base) + len(places.whole),
        "dtype": str(target).removeprefix("torch."),
        "size_bytes": sum(file.stat().st_size for file in written),
    }


@torch.no_grad()
def fold(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Fold every adapter layer into its base, in place, in ``dtype`` (default: the base's own).

    A weight that is shared gets its own memory. Returns the number of modules.
    """
    layers = adapted_modules(model)
    for name, layer in layers.items():
        weight = layer.merged_weight(layer.weight)
        layer.base_layer.weight = nn.Parameter(
            weight.to(dtype or layer.weight.dtype), requires_grad=False
        )
        model.set_submodule(name, layer.base_layer)
    return len(layers)


def _embeddings_parted(model: PreTrainedModel) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is not model.get_input_embeddings().weight
