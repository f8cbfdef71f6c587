"""A quantized base whose matrices are dequantized as they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.adapters.merge.checkpoint import QUANTIZED, Checkpoint, StoredTensor
from lorakit.models.quantization import (
    Format,
    Names,
    check_plain,
    explained_parts,
    format_of,
    quantization_of,
    split_names,
)

#: Further files that say how the base is quantized.
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json")


def open_checkpoint(directory: Path, settings: Mapping[str, Any]) -> Checkpoint:
    """The tensors of a base with the ``config.json`` ``settings``. Raises ModelError as
    ``Checkpoint`` does, and for a quantization that is not read."""
    quantization = quantization_of(settings)
    if quantization is None:
        return Checkpoint(directory)
    return QuantizedCheckpoint(directory, format_of(quantization, f"base: {directory}"))


def dequantization_note(checkpoint: Checkpoint, dtype: str | None) -> str | None:
    """A note about the dtype of what is written; None if the base is not quantized."""
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return None
    return (
        f"base {checkpoint.directory}: {checkpoint.format.label}: dequantized into "
        f"{dtype or 'bfloat16'}; the merged model is not quantized"
    )


def drop_quantization(settings: dict[str, Any]) -> None:
    """Remove what says that the weights are quantized, also in nested configurations."""
    settings.pop("quantization_config", None)
    for part in settings.values():
        if isinstance(part, dict):
            part.pop("quantization_config", None)


class QuantizedCheckpoint(Checkpoint):
    """A quantized matrix is one tensor, under the name of its parameter."""

    def __init__(self, directory: Path, form: Format) -> None:
        super().__init__(directory)
        self.format = form
        self._parts, plain = split_names(form, self.tensors)
        self._stored = self.tensors
        matrices = {name: self._matrix(name) for name in self._parts}
        self.tensors = {}
        first = {min(parts.values()): name for name, parts in self._parts.items()}
        kept = {*plain}
        for name, stored in self._stored.items():
            if name in first:
                self.tensors[first[name]] = matrices[first[name]]
            elif name in kept:
                self.tensors[name] = stored
        check_plain({n: self._stored[n].code for n in plain}, form, f"base: {directory}")

    def read(self, name: str) -> Tensor:
        """Read a tensor; a quantized matrix is returned in float32. Raises ModelError for parts
        that do not fit together."""
        parts = self._parts.get(name)
        if parts is None:
            return super().read(name)
        values = {part: self._part(own) for part, own in parts.items()}
        with explained_parts(self.format, f"base: {self.directory}: {name}"):
            return self.format.dense(values).contiguous()

    def _matrix(self, name: str) -> StoredTensor:
        parts: Names = self._parts[name]
        shapes = {part: self._stored[own].shape for part, own in parts.items()}
        with explained_parts(self.format, f"base: {self.directory}: {name}"):
            shape = self.format.shape(shapes, lambda part: self._part(parts[part]))
        main = self._stored[min(parts.values())]
        size = 4 * math.prod(shape)
        return replace(main, shape=shape, code=QUANTIZED, size_bytes=size)

    def _part(self, name: str) -> Tensor:
        return self.read_bytes(self._stored[name])
