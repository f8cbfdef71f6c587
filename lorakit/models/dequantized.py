"""Load the weights of a model; those of a quantized checkpoint are dequantized."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from lorakit.errors import ModelError
from lorakit.models.quantization import (
    Format,
    Names,
    check_plain,
    explained_parts,
    format_of,
    quantization_of,
    split_names,
)
from lorakit.recipe.sections import ModelSection

#: Formats that transformers dequantizes itself.
_NATIVE = ("mxfp4",)
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_HUB_KEYS = ("revision", "local_files_only")


def from_pretrained(
    loader: Any, name: str, config: PreTrainedConfig, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return ``loader.from_pretrained`` and its loading info: randomly initialized weights, and
    those of another shape, are listed and not an error.

    A quantized checkpoint is dequantized, into ``dtype`` of ``options`` or that of its
    configuration, as it is read. Raises ModelError for a format that is not read.
    """
    source = dequantizer(name, config)
    common = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if source is None:
        model, info = loader.from_pretrained(
            name, config=config, use_safetensors=True, **common, **options
        )
        return model, info
    hub = {key: options[key] for key in _HUB_KEYS if key in options}
    directory = _directory(name, hub)
    trust = options.get("trust_remote_code", False)
    dense = without_quantization(config)
    dtype = options.get("dtype")
    if not isinstance(dtype, torch.dtype):
        dtype = dense.dtype if isinstance(dense.dtype, torch.dtype) else torch.bfloat16
    with torch.device("meta"):
        skeleton = loader.from_config(dense, trust_remote_code=trust)
    rest = {k: v for k, v in options.items() if k == "attn_implementation"}
    state = _state(directory, source, dtype)
    model, info = type(skeleton).from_pretrained(
        None, config=skeleton.config, state_dict=state, dtype=dtype, **common, **rest
    )
    if model.can_generate():
        with suppress(OSError):  # the configuration's values apply
            model.generation_config = GenerationConfig.from_pretrained(directory)
    return model, info


def dequantizer(name: str, config: PreTrainedConfig) -> Format | None:
    """The format of a quantized checkpoint that is dequantized here. Raises ModelError for one that
    is not read."""
    quantization = quantization_of(config.to_dict())
    if quantization is None or quantization.get("quant_method") in _NATIVE:
        return None
    return format_of(quantization, name)


def dequantization_notes(section: ModelSection, config: PreTrainedConfig) -> list[str]:
    """Say that a recipe's base is dequantized, if it is. Raises ModelError as ``dequantizer``."""
    source = dequantizer(section.name_or_path, config)
    if source is None:
        return []
    kept = "" if section.base_precision else "; model.base_precision keeps it quantized in training"
    return [f"{section.name_or_path}: {source.label}, dequantized into {section.dtype}{kept}"]


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of ``config`` for dense weights."""
    config = copy.deepcopy(config)
    for part in (config, *vars(config).values()):
        if isinstance(part, PreTrainedConfig) and hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


@dataclass(frozen=True)
class _Matrix:
    """Takes the place of a tensor in a state dict; ``[...]`` reads it."""

    name: str
    format: Format
    parts: Names
    handles: Mapping[str, Any]
    dtype: torch.dtype

    def __getitem__(self, _everything: Any) -> Tensor:
        parts = {part: self.handles[n].get_tensor(n) for part, n in self.parts.items()}
        with explained_parts(self.format, self.name):
            return self.format.dense(parts).to(self.dtype)


def _state(directory: Path, form: Format, dtype: torch.dtype) -> dict[str, Any]:
    """The state dict of a quantized checkpoint, whose values are read when they are needed."""
    handles: dict[str, Any] = {}
    for file in _files(directory):
        handle: Any = safe_open(file, framework="pt")
        handles |= dict.fromkeys(handle.keys(), handle)
    matrices, plain = split_names(form, handles)
    codes = {name: str(handles[name].get_slice(name).get_dtype()) for name in plain}
    check_plain(codes, form, str(directory))
    state = {name: handles[name].get_slice(name) for name in plain}
    where = f"{directory}: "
    return state | {n: _Matrix(where + n, form, own, handles, dtype) for n, own in matrices.items()}


def _files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.is_file() and not (directory / _SINGLE).is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [directory / name for name in sorted(set(names))]
    if not (directory / _SINGLE).is_file():
        raise ModelError(f"{directory}: no {_SINGLE}; only safetensors are read")
    return [directory / _SINGLE]


def _directory(name: str, hub: Mapping[str, Any]) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "model*.safetensors"], **hub))
