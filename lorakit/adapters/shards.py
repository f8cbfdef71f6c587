"""Tensors -> safetensors files of bounded size, named and indexed as transformers does."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit.adapters.checkpoint import INDEX, SINGLE
from lorakit.errors import AdapterError, shown

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip


@dataclass(frozen=True)
class OutputTensor:
    """Shape and dtype of a tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.parameters * self.dtype.itemsize


def parse_size(text: str | int) -> int:
    """Bytes of ``5GB``, ``200MiB`` or a number. Raises AdapterError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(text).strip().upper())
    if not match or match[2] not in _UNITS or not 0 < float(match[1]) < 1e18:
        raise AdapterError(f"max_shard_size = {shown(text)}: allowed: a size such as 5GB or 200MB")
    return int(float(match[1]) * _UNITS[match[2]])


def plan_shards(outputs: Mapping[str, OutputTensor], max_shard_bytes: int) -> list[list[str]]:
    """The names of each file's tensors, in order; a larger tensor has a file of its own."""
    shards: list[list[str]] = []
    size = 0
    for name, output in outputs.items():
        if not shards or (size and size + output.size_bytes > max_shard_bytes):
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += output.size_bytes
    return shards


def write_shards(
    folder: Path,
    outputs: Mapping[str, OutputTensor],
    max_shard_bytes: int,
    value: Callable[[str], Tensor],
) -> list[str]:
    """Ask for each tensor's value when its file's turn comes; one file's tensors are held at most.

    Returns the file names.
    """
    shards = plan_shards(outputs, max_shard_bytes)
    files = [_file_name(index, len(shards)) for index in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: value(name) for name in names}
        for name, tensor in tensors.items():
            assert (tuple(tensor.shape), tensor.dtype) == (outputs[name].shape, outputs[name].dtype)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
    if len(files) > 1:
        metadata = {
            "total_parameters": sum(output.parameters for output in outputs.values()),
            "total_size": sum(output.size_bytes for output in outputs.values()),
        }
        weight_map = {n: file for file, names in zip(files, shards, strict=True) for n in names}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _file_name(index: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
