"""A base model's safetensors on disk: each tensor's name, shape, dtype and offset.

Headers are parsed here, so that bytes can be copied from file to file without a tensor library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.errors import ModelError, shown
from lorakit.io.json_file import read_json_object
from lorakit.models.hub import explained, hub_options, is_missing_path, other_content

if TYPE_CHECKING:
    from lorakit.recipe.sections import ModelSection


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: Not downloaded: weights in formats that are not read, and leftovers of training.
_NOT_DOWNLOADED = [
    "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot",
    "*.tflite", "*.mlmodel", "*.npz", "consolidated*", "original/*", "onnx/*", "*/*.safetensors",
]  # fmt: skip

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
#: In place of a code, for a quantized matrix.
QUANTIZED = "quantized"
#: Read as parts of quantized matrices only.
_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
CODES = {dtype: code for code, dtype in DTYPES.items()}
#: The same limit as in the safetensors library.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose bytes begin at ``start`` in ``file``. ``code`` is its dtype's code in
    safetensors files, possibly of a dtype that lorakit can only copy. The values of a quantized
    matrix, which are computed from several tensors, are float32; only ``Checkpoint.read`` returns
    them."""

    file: Path
    shape: tuple[int, ...]
    code: str
    start: int
    size_bytes: int

    @property
    def is_quantized(self) -> bool:
        return self.code == QUANTIZED

    @property
    def dtype(self) -> torch.dtype | None:
        return torch.float32 if self.is_quantized else DTYPES.get(self.code)

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype is not None and self.dtype.is_floating_point


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written; ``code`` is its dtype's code in safetensors files."""

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


class Checkpoint:
    """The tensors of a model directory, in file order. ``metadata`` is that of each file's header.
    If two files have the same name, the later one is used, as in transformers.

    A context manager that keeps files open until it exits. Raises ModelError if the safetensors of
    the directory are missing or incomplete.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        for file in _files(directory):
            self.metadata[file], tensors = read_header(file)
            for name in tensors:
                self.tensors.pop(name, None)
            self.tensors |= tensors
        _check_index(directory, self.tensors, tuple(self.metadata))
        self._stack = ExitStack()
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._open.clear()

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.metadata)

    def descriptor(self, file: Path) -> int:
        """Return a file descriptor, for ``os.pread`` and similar functions."""
        if file not in self._open:
            handle = os.open(file, os.O_RDONLY)
            self._stack.callback(os.close, handle)
            self._open[file] = handle
        return self._open[file]

    def read(self, name: str) -> Tensor:
        """Read a tensor into new memory."""
        return self.read_bytes(self.tensors[name])

    def read_bytes(self, stored: StoredTensor) -> Tensor:
        """Read the bytes of ``stored`` as its dtype."""
        dtype = stored.dtype or _FLOAT8.get(stored.code)
        if dtype is None:
            raise ModelError(f"base: {stored.file}: a tensor of dtype {stored.code} cannot be read")
        value = torch.empty(stored.shape, dtype=dtype)
        if value.numel():
            read_into(self.descriptor(stored.file), memory_of(value.view(-1)), stored.start)
        return value


def memory_of(values: Tensor) -> memoryview:
    """The bytes of a contiguous one-dimensional tensor."""
    return values.view(torch.uint8).numpy().data


def read_into(handle: int, into: memoryview, start: int) -> None:
    """Fill ``into`` with a file's bytes from ``start`` on. Raises OSError if there are too few."""
    done = 0
    while done < len(into):
        if hasattr(os, "preadv"):
            count = os.preadv(handle, [into[done:]], start + done)
        else:  # macOS
            part = os.pread(handle, len(into) - done, start + done)
            count = len(part)
            into[done : done + count] = part
        if not count:
            raise OSError("a file of the base was truncated while being read")
        done += count


def read_header(file: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Return the metadata and the tensors of a safetensors file, in the order of their offsets.

    Raises ModelError for a file that is incomplete or corrupt.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            first = opened.read(8)
            if first == b"version ":
                raise ValueError("a Git LFS pointer instead of weights; hint: run git lfs pull")
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"{size} bytes, which end inside the header")
            header = json.loads(opened.read(length))
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _stored(file, name, entry, 8 + length) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"base: {file}: corrupt or truncated: {error}") from error
    ordered = dict(sorted(tensors.items(), key=lambda t: (t[1].start, t[1].size_bytes)))
    end = 8 + length
    for name, stored in ordered.items():
        if stored.start != end:
            raise ModelError(
                f"base: {file}: corrupt: {name} does not start where the previous tensor ends"
            )
        end += stored.size_bytes
    if end != size:
        raise ModelError(f"base: {file}: corrupt or truncated: {size} bytes, expected {end}")
    return metadata, ordered


def _stored(file: Path, name: str, entry: Mapping[str, Any], base: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    shape, code = tuple(entry["shape"]), entry["dtype"]
    stored = StoredTensor(file, shape, code, base + start, stop - start)
    dtype = stored.dtype
    if not 0 <= start <= stop or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{name}: {shown(dict(entry))}")
    if dtype is not None and stored.parameters * dtype.itemsize != stored.size_bytes:
        raise ValueError(f"{name}: {code} {shape} does not have {stored.size_bytes} bytes")
    return stored


def local_directory(section: ModelSection) -> Path:
    """Return the model's directory, downloading it if the name is a Hub id, without weights in
    formats that are not read. Raises ModelError if neither exists."""
    name = section.name_or_path
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        what = other_content(Path(name)) or "a file"
        raise ModelError(f"base: {name}: {what}; allowed: a model directory, or a Hub id")
    if is_missing_path(name):
        raise ModelError(f"base: {name}: no such directory")
    from huggingface_hub import snapshot_download

    options = {k: v for k, v in hub_options(section).items() if k != "trust_remote_code"}
    with explained(name):
        return Path(snapshot_download(name, ignore_patterns=_NOT_DOWNLOADED, **options))


def read_config(directory: Path) -> dict[str, Any]:
    """Return ``config.json`` as stored. Raises ModelError if it is missing or invalid."""
    file = directory / "config.json"
    try:
        config = read_json_object(file)
    except FileNotFoundError:
        what = other_content(directory)
        hint = f" ({what})" if what else ""
        raise ModelError(f"base: {directory}: no config.json in the directory{hint}") from None
    except ValueError as error:
        raise ModelError(f"base: {file}: {error}") from error
    named = config.get("transformers_weights")
    if named not in (None, SINGLE, INDEX):
        raise ModelError(
            f"base: {file}: transformers_weights = {shown(named)}: allowed: {SINGLE} or {INDEX}"
        )
    return config


def _files(directory: Path) -> list[Path]:
    """The files that transformers reads; a single file takes precedence over an index."""
    index, single = directory / INDEX, directory / SINGLE
    names = sorted(set(_weight_map(index).values())) if index.is_file() else []
    files = [directory / name for name in names]
    if single.is_file() or not index.is_file():
        files = [single]
    for file in files:
        if not file.is_file():
            source = f" ({INDEX} names it)" if index.is_file() else ""
            pickled = any(directory.glob("pytorch_model*.bin"))
            hint = "; hint: save the pickled weights as safetensors first" if pickled else ""
            raise ModelError(
                f"base: {directory}: no {file.name}{source}; only safetensors can be merged{hint}"
            )
    return files


def _check_index(
    directory: Path, tensors: Mapping[str, StoredTensor], files: tuple[Path, ...]
) -> None:
    index = directory / INDEX
    if not index.is_file() or files == (directory / SINGLE,):
        return
    for name, file in _weight_map(index).items():
        if name not in tensors:
            raise ModelError(f"base: {index}: {name} is not in {file}")


def _weight_map(index: Path) -> Mapping[str, str]:
    """Tensor -> file. Raises ModelError for an invalid index."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"base: {index}: invalid index: {error!r}") from error
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ModelError(f"base: {index}: weight_map: allowed: file names by tensor")
    for file in set(found.values()):
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise ModelError(f"base: {index}: weight_map names {shown(file)}, outside of the base")
    return found
