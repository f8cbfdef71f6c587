"""Tensors in GGUF's types, and a file that is written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.adapters.merge.workers import OnProgress
from lorakit.adapters.peft.read import is_finite
from lorakit.errors import ModelError, UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

#: ``--dtype`` -> GGUF's name of the type, and that of a file in which most tensors have it.
DTYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
#: The dtype of a model's weights -> the type that keeps their values.
OF_TORCH = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written; ``read`` returns its values, of ``shape``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        import gguf

        kind = _type(self.dtype)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        count = torch.Size(self.shape).numel()
        return int(count // per_block * block_bytes)


@dataclass(frozen=True)
class Written:
    """A file that was written: how many ``tensors``, of which most have ``dtype``."""

    tensors: int
    dtype: str
    size_bytes: int
    notes: tuple[str, ...] = ()


def require_gguf() -> None:
    """Raise UserError if the package that writes GGUF is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--to gguf: requires the package gguf; hint: pip install 'lorakit[gguf]'"
        ) from error


def check_dtype(dtype: str | None, allowed: Iterable[str] = DTYPES) -> None:
    """Raise UserError unless ``dtype`` is None or ``allowed``."""
    if dtype is not None and dtype not in (names := tuple(allowed)):
        raise UserError(f"--dtype = {dtype}: allowed: {', '.join(names)}")


def tensor_dtype(shape: tuple[int, ...], wanted: str) -> str:
    """The type of a tensor in a file of type ``wanted``: norms and biases are float32 as in
    llama.cpp, and a matrix whose rows cannot be divided into blocks is float16."""
    if len(shape) < 2:
        return "f32"
    return "f16" if wanted == "q8_0" and shape[-1] % 32 else wanted


def file_type(dtype: str) -> int:
    """The value of ``general.file_type``."""
    import gguf

    return int(gguf.LlamaFileType[DTYPES[dtype][1]])


def write_file(
    writer: GGUFWriter, path: Path, tensors: Iterable[OutputTensor], on_progress: OnProgress
) -> int:
    """Write the keys that ``writer`` has and ``tensors``, of which one is in memory at a time.
    Returns the size in bytes. Raises ModelError for a value that the type cannot represent."""
    import numpy

    tensors = list(tensors)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, numpy.dtype(numpy.float32), tensor.size_bytes,
            raw_dtype=_type(tensor.dtype),
        )  # fmt: skip
    done, total = 0, sum(tensor.size_bytes for tensor in tensors)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_encoded(tensor))
            done += tensor.size_bytes
            on_progress(done, total)
    finally:
        writer.close()
    return path.stat().st_size


def _encoded(tensor: OutputTensor) -> Any:
    """The values of ``tensor`` as an array of its type."""
    import gguf

    values = tensor.read()
    assert tuple(values.shape) == tensor.shape, tensor.name
    if tensor.dtype == "f16":
        values = values.to(torch.float16)
        if not is_finite(values):
            raise ModelError(
                f"{tensor.name}: values exceed the range of float16; hint: --dtype bf16 or f32"
            )
        return values.contiguous().numpy()
    return gguf.quants.quantize(values.float().contiguous().numpy(), _type(tensor.dtype))


def _type(dtype: str) -> GGMLQuantizationType:
    import gguf

    return gguf.GGMLQuantizationType[DTYPES[dtype][0]]
