"""A base model's safetensors on disk: names, shapes and dtypes at once, values one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.errors import ModelError
from lorakit.models.load import explained, hub_options
from lorakit.recipe.sections import ModelSection

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: What a tokenizer may consist of, its chat template included.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """The tensors of a model directory. Raises ModelError if it holds no whole safetensors."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = dict(_headers(directory))
        self._open: dict[Path, Any] = {}

    def read(self, name: str) -> Tensor:
        """The values; the file stays open for the next call."""
        file = self.tensors[name].file
        if file not in self._open:
            self._open = {file: safe_open(file, framework="pt")}
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor


def local_directory(section: ModelSection) -> Path:
    """The model's directory, downloaded from the Hub if it is none: weights, JSON, tokenizer."""
    name = section.name_or_path
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    options = {k: v for k, v in hub_options(section).items() if k != "trust_remote_code"}
    patterns = ["*.safetensors", "*.json", "*.py", f"{TEMPLATES}/*", *TOKENIZER_FILES]
    with explained(name, "base"):
        found = snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=["*/*.safetensors"], **options
        )
    return Path(found)


def _headers(directory: Path) -> Iterator[tuple[str, StoredTensor]]:
    index = directory / INDEX
    if index.is_file():
        files = [directory / name for name in dict.fromkeys(_weight_map(index).values())]
    else:
        files = [directory / SINGLE]
    for file in files:
        if not file.is_file():
            raise ModelError(f"base: {directory}: no {file.name}; lorakit merges safetensors only")
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (not a mapping)
                    part = stored.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise ModelError(
                            f"base: {file}: {name} is {part.get_dtype()}: a quantised base cannot "
                            "be merged into; merge into the original weights"
                        )
                    yield name, StoredTensor(file, tuple(part.get_shape()), dtype)
        except SafetensorError as error:
            raise ModelError(f"base: {file}: corrupt or cut short: {error}") from error


def _weight_map(index: Path) -> Mapping[str, str]:
    """Tensor -> file. Raises ModelError if the index does not say it."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"base: {index}: no index of weights: {error!r}") from error
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ModelError(f"base: {index}: weight_map: allowed: file names by tensor")
    return found
