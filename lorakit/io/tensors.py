"""Tensors in files: writing them as safetensors, and checking what was read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.io.atomic import os_errors


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors that do not share memory. Raises OSError if the disk is full."""
    file.touch()
    mode = file.stat().st_mode  # which follows the umask; that of safetensors is 0600
    with os_errors(SafetensorError, file):
        save_file(dict(tensors), file, {"format": "pt"})
    file.chmod(mode)


def check_shape(name: str, value: Tensor, own: Tensor) -> None:
    """Raise AdapterError unless ``value``, from a file, has the shape of the model's ``own``."""
    if value.shape != own.shape:
        raise AdapterError(
            f"{name} is {tuple(value.shape)}, and the model needs {tuple(own.shape)}: the adapter "
            "belongs to another base model"
        )


def check_floating_point(name: str, value: Tensor) -> None:
    """Raise AdapterError for integers, booleans and complex numbers."""
    if not value.is_floating_point():
        dtype = str(value.dtype).removeprefix("torch.")
        raise AdapterError(f"{name} is {dtype}; allowed: floating-point numbers")
