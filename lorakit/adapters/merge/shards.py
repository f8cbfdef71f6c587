"""Safetensors files of bounded size: which tensors go into which, their headers and the index."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit.adapters.merge.checkpoint import CODES, INDEX, SINGLE, Checkpoint, StoredTensor
from lorakit.errors import AdapterError, shown

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip


@dataclass(frozen=True)
class OutputTensor:
    """A tensor that is to be written; ``code`` is its dtype by safetensors' name."""

    shape: tuple[int, ...]
    code: str
    size_bytes: int

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype) -> OutputTensor:
        return OutputTensor(tuple(shape), CODES[dtype], math.prod(shape) * dtype.itemsize)

    @staticmethod
    def like(stored: StoredTensor) -> OutputTensor:
        return OutputTensor(stored.shape, stored.code, stored.size_bytes)

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes begin."""

    file: str
    start: int


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


def plan_files(
    outputs: Mapping[str, OutputTensor],
    checkpoint: Checkpoint,
    stored: Mapping[str, str],
    max_shard_bytes: int,
) -> dict[str, list[str]]:
    """File name -> the names of its tensors: the base's own files as long as none is larger than
    ``max_shard_bytes``, else files named as transformers does.

    ``stored`` is the base's tensor that an output stands for; an output without one is added to
    the last file.
    """
    own = {file: file.relative_to(checkpoint.directory).as_posix() for file in checkpoint.files}
    last = checkpoint.files[-1]
    files: dict[str, list[str]] = {name: [] for name in own.values()}
    for name in outputs:
        file = checkpoint.tensors[stored[name]].file if name in stored else last
        files[own[file]].append(name)
    files = {file: names for file, names in files.items() if names}
    sizes = {f: sum(outputs[n].size_bytes for n in names) for f, names in files.items()}
    fit = all(sizes[f] <= max_shard_bytes or len(files[f]) == 1 for f in files)
    if fit and all("/" not in file for file in files):
        return files
    shards = plan_shards(outputs, max_shard_bytes)
    return {_file_name(i, len(shards)): names for i, names in enumerate(shards)}


def create_files(
    folder: Path,
    files: Mapping[str, Sequence[str]],
    outputs: Mapping[str, OutputTensor],
    metadata: Mapping[str, Mapping[str, str]],
) -> dict[str, Place]:
    """Write every file's header, give it its full size, and the index if there are several.

    ``metadata`` is the headers' by file, by default ``{"format": "pt"}``. Returns where each
    tensor's bytes belong.
    """
    places: dict[str, Place] = {}
    for file, names in files.items():
        ordered = _aligned(names, outputs)
        header: dict[str, object] = {"__metadata__": dict(metadata.get(file) or {"format": "pt"})}
        at, starts = 0, {}
        for name in ordered:
            output = outputs[name]
            starts[name] = at
            offsets = [at, at + output.size_bytes]
            header[name] = {
                "dtype": output.code, "shape": list(output.shape), "data_offsets": offsets,
            }  # fmt: skip
            at = offsets[1]
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + at)
        places |= {name: Place(file, 8 + len(text) + start) for name, start in starts.items()}
    if list(files) != [SINGLE]:
        _write_index(folder / INDEX, files, outputs)
    return places


def _write_index(
    index: Path, files: Mapping[str, Sequence[str]], outputs: Mapping[str, OutputTensor]
) -> None:
    metadata = {
        "total_parameters": sum(output.parameters for output in outputs.values()),
        "total_size": sum(output.size_bytes for output in outputs.values()),
    }
    weight_map = {name: file for file, names in files.items() for name in names}
    value = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    index.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _aligned(names: Sequence[str], outputs: Mapping[str, OutputTensor]) -> list[str]:
    """The order of ``names``, unless a tensor would begin at no multiple of its item size, where
    readers fail: then the wider ones come first."""
    at = 0
    for name in names:
        if at % _item_size(outputs[name]):
            return sorted(names, key=lambda n: -_item_size(outputs[n]))
        at += outputs[name].size_bytes
    return list(names)


def _item_size(output: OutputTensor) -> int:
    return max(1, output.size_bytes // max(1, output.parameters))


def _file_name(index: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
