"""The files of the merged model: sharded safetensors, ``config.json`` and copies of the base's."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.adapters.merge.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    OutputTensor,
    memory_of,
)
from lorakit.adapters.merge.plan import MergePlan
from lorakit.adapters.merge.quantized import QUANTIZATION_FILES, drop_quantization
from lorakit.adapters.merge.tokenizer import Tokenizer
from lorakit.adapters.merge.updates import ResolvedBase

CONFIG = "config.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")
#: Larger files are unlikely to be settings, and could fill the disk.
_LARGEST = 500_000_000
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5",
    ".msgpack", ".ot", ".tflite", ".mlmodel", ".mlpackage", ".npz", ".engine", ".nemo", ".distcp",
)  # fmt: skip
_WEIGHT_FOLDERS = ("original", "onnx", "openvino", "coreml")
_OTHER_FORMAT = "weights in another format, without the adapter"
_IGNORED = (".git", ".cache", "__pycache__", ".ipynb_checkpoints", ".DS_Store")


@dataclass(frozen=True)
class Place:
    """The file and the offset of a tensor's bytes."""

    file: str
    start: int


def plan_shards(outputs: Mapping[str, OutputTensor], max_shard_bytes: int) -> list[list[str]]:
    """Distribute the tensors to files, in order. A tensor above the limit gets its own file."""
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
    """Return the tensors of each file. They are divided into files as in the base unless a file
    would exceed ``max_shard_bytes``; new files are named as in transformers.

    ``stored``: output -> the base's tensor that it replaces; an output without one is added to the
    last file.
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
    """Create each file with its header and its full size, and the index if there are several.

    ``metadata`` is that of the headers, by file; the default is ``{"format": "pt"}``. Returns the
    place of each tensor's bytes.
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


class OutputFiles:
    """The files of ``create_files``, open for writing by several threads."""

    def __init__(
        self,
        files: Mapping[str, int],
        places: Mapping[str, Place],
        outputs: Mapping[str, OutputTensor],
    ) -> None:
        self.files = files
        self.places = places
        self.outputs = outputs

    def at(self, name: str) -> tuple[int, int]:
        """Return the descriptor of the file, and the tensor's offset in it."""
        place = self.places[name]
        return self.files[place.file], place.start

    def write(self, name: str, values: Tensor, first: int = 0) -> int:
        """Write ``values`` from element ``first`` of the tensor on. Returns the number of bytes."""
        if values.numel() == 0:
            return 0
        handle, start = self.at(name)
        flat = memory_of(values.contiguous().view(-1))
        write_at(handle, flat, start + first * values.dtype.itemsize)
        return len(flat)


def write_at(handle: int, content: memoryview, start: int) -> None:
    """Write all of ``content`` into a file from ``start`` on."""
    done = 0
    while done < len(content):
        done += os.pwrite(handle, content[done:], start + done)


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
    """``names``, with the widest dtypes first if a tensor would otherwise be misaligned, which
    readers reject."""
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


def write_config(
    folder: Path,
    directory: Path,
    base: ResolvedBase,
    plan: MergePlan,
    dtype: str | None,
    sharded: bool,
) -> None:
    """Write ``config.json``: a copy of the one in the base's ``directory``, edited only where the
    model changed. ``dtype`` is the requested one; None keeps that of each tensor."""
    content = (directory / CONFIG).read_bytes()
    settings: dict[str, Any] = json.loads(content)
    before = json.dumps(settings)
    if base.architecture is not None:
        settings["architectures"] = [base.architecture]
    settings |= base.settings
    drop_quantization(settings)
    if "num_labels" in settings and "id2label" in base.settings:
        settings["num_labels"] = len(settings["id2label"])
    if base.vocab_size is not None:
        for part in (settings, settings.get(base.text_config or "")):
            if isinstance(part, dict) and "vocab_size" in part:
                part["vocab_size"] = base.vocab_size
    if dtype is not None:
        _set_dtype(settings, dtype)
    if plan.untied:
        settings["tie_word_embeddings"] = False
        if base.text_config is not None:
            part = settings.get(base.text_config) or {}
            settings[base.text_config] = {**part, "tie_word_embeddings": False}
    if (
        "transformers_weights" in settings
        and (settings["transformers_weights"] == INDEX) != sharded
    ):
        del settings["transformers_weights"]
    if json.dumps(settings) != before:
        content = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    (folder / CONFIG).write_bytes(content)


def _set_dtype(settings: dict[str, Any], dtype: str, top: bool = True) -> None:
    """Set the dtype under the base's own key, and in nested configurations."""
    keys = [key for key in _DTYPE_KEYS if key in settings] or (["dtype"] if top else [])
    for key in keys:
        settings[key] = dtype
    for key, value in settings.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            part = dict(value)
            _set_dtype(part, dtype, top=False)
            settings[key] = part


@dataclass(frozen=True)
class LeftOut:
    """A file of the base that was not copied, relative to its directory; a folder's name ends with
    a slash."""

    name: str
    reason: str


def copy_files(folder: Path, base: Path, weights: set[str], tokenizer: Tokenizer) -> list[LeftOut]:
    """Copy the base's files to ``folder``, except for its ``weights`` and ``config.json``, and
    write the adapter's ``tokenizer`` if it replaces the base's. Returns the files left out."""
    left_out: list[LeftOut] = []
    components = _components(base)
    for name in _walk(base, left_out):
        if name in weights or name == CONFIG or name in tokenizer.written:
            continue
        if name == INDEX and (folder / INDEX).is_file():
            continue
        reason = _reason(base / name, name, components) or tokenizer.replaced.get(name)
        if reason is not None:
            left_out.append(LeftOut(name, reason))
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, folder / name)
    _write_tokenizer(folder, tokenizer)
    return left_out


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    for name, content in tokenizer.written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _walk(base: Path, left_out: list[LeftOut]) -> Iterator[str]:
    """Yield every file's name relative to ``base``, following links such as those of the Hub
    cache."""
    seen: set[str] = set()
    pending = [""]
    while pending:
        inside = pending.pop()
        real = os.path.realpath(base / inside)
        if real in seen:  # a link to a parent folder
            continue
        seen.add(real)
        for path in sorted((base / inside).iterdir()):
            name = path.relative_to(base).as_posix()
            if path.name in _IGNORED:
                continue
            if path.is_dir() and path.name in _WEIGHT_FOLDERS:
                left_out.append(LeftOut(f"{name}/", _OTHER_FORMAT))
            elif path.is_dir():
                pending.append(name)
            elif path.is_file():
                yield name
            else:
                what = "a broken symlink" if path.is_symlink() else "not a regular file"
                left_out.append(LeftOut(name, what))


def _reason(path: Path, name: str, components: tuple[str, ...]) -> str | None:
    """Why a file is not copied; None if it is."""
    if name.startswith(components):
        return None
    lower = name.lower()
    if re.search(r"(?:^|/)(?:optimizer|scheduler|scaler|rng_state\w*|training_args)\.\w+$", lower):
        return "training state"
    if lower.endswith((*_WEIGHTS, *(f"{end}.index.json" for end in _WEIGHTS))):
        return _weights_reason(name, lower)
    if lower in QUANTIZATION_FILES:
        return "settings of the base's quantization"
    if re.search(r"(?:^|/)adapter_config\.json$", lower):
        return "adapter configuration, which transformers would load"
    if path.stat().st_size > _LARGEST:
        return f"larger than {_LARGEST / 1e6:.0f} MB"
    return None


def _weights_reason(name: str, lower: str) -> str:
    if name == INDEX:
        return "index of files that are not written"
    if lower.endswith((".safetensors", ".safetensors.index.json")):
        inside = "/" in name
        return f"weights {'in a subfolder' if inside else 'next to the model'}, without the adapter"
    return _OTHER_FORMAT


def _components(base: Path) -> tuple[str, ...]:
    """The folders of sentence-transformers' additional layers, which have their own weights."""
    try:
        modules: Any = json.loads((base / "modules.json").read_text(encoding="utf-8"))
        return tuple(f"{module['path']}/" for module in modules if module["path"])
    except (OSError, ValueError, TypeError, KeyError):
        return ()
