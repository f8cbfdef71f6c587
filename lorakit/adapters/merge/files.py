"""The merged model's ``config.json``: the base's own text, edited only where the model changed.

The files beside the weights: all of the base's go along, but for weights in other formats.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.adapters.merge.checkpoint import INDEX
from lorakit.adapters.merge.plan import MergePlan
from lorakit.adapters.merge.tokenizer import Tokenizer
from lorakit.adapters.merge.updates import Held

CONFIG = "config.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")


def write_config(
    folder: Path, base: Path, held: Held, plan: MergePlan, dtype: str | None, sharded: bool
) -> None:
    """Write ``config.json``; where nothing changes, the base's bytes.

    ``dtype`` is what was asked for (None: every tensor keeps its own)."""
    content = (base / CONFIG).read_bytes()
    settings: dict[str, Any] = json.loads(content)
    before = json.dumps(settings)
    if held.architecture is not None:
        settings["architectures"] = [held.architecture]
    settings |= held.settings
    if "num_labels" in settings and "id2label" in held.settings:
        settings["num_labels"] = len(settings["id2label"])
    if dtype is not None:
        _set_dtype(settings, dtype)
    if plan.untied:
        settings["tie_word_embeddings"] = False
        if held.text_config is not None:
            part = settings.get(held.text_config) or {}
            settings[held.text_config] = {**part, "tie_word_embeddings": False}
    if (
        "transformers_weights" in settings
        and (settings["transformers_weights"] == INDEX) != sharded
    ):
        del settings["transformers_weights"]
    if json.dumps(settings) != before:
        content = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    (folder / CONFIG).write_bytes(content)


def _set_dtype(settings: dict[str, Any], dtype: str, top: bool = True) -> None:
    """Under the base's own key, and in the parts of a model of several."""
    keys = [key for key in _DTYPE_KEYS if key in settings] or (["dtype"] if top else [])
    for key in keys:
        settings[key] = dtype
    for key, value in settings.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            part = dict(value)
            _set_dtype(part, dtype, top=False)
            settings[key] = part


#: Larger files are no settings, and would fill the disk.
_LARGEST = 500_000_000
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5",
    ".msgpack", ".ot", ".tflite", ".mlmodel", ".mlpackage", ".npz", ".engine", ".nemo", ".distcp",
)  # fmt: skip
_WEIGHT_FOLDERS = ("original", "onnx", "openvino", "coreml")
_OTHER_FORMAT = "weights in another format, without the adapter"
_PASSED_OVER = (".git", ".cache", "__pycache__", ".ipynb_checkpoints", ".DS_Store")


@dataclass(frozen=True)
class LeftOut:
    """A file of the base that the merged model does not have, relative to its directory; a folder
    ends with a slash."""

    name: str
    reason: str


def copy_files(folder: Path, base: Path, weights: set[str], tokenizer: Tokenizer) -> list[LeftOut]:
    """Copy into ``folder`` what the base has besides its ``weights`` and ``config.json``, and the
    adapter's ``tokenizer`` if that is the one to take. Returns what was left out of the base."""
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
    """Every file by its name relative to ``base``; links are followed, as in the Hub's cache."""
    seen: set[str] = set()
    pending = [""]
    while pending:
        inside = pending.pop()
        real = os.path.realpath(base / inside)
        if real in seen:  # a link to a folder above
            continue
        seen.add(real)
        for path in sorted((base / inside).iterdir()):
            name = path.relative_to(base).as_posix()
            if path.name in _PASSED_OVER:
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
    """Why a file is left out; None for one that is copied."""
    if name.startswith(components or ("\0",)):
        return None
    lower = name.lower()
    if re.search(r"(?:^|/)(?:optimizer|scheduler|scaler|rng_state\w*|training_args)\.\w+$", lower):
        return "training state"
    if lower.endswith((*_WEIGHTS, *(f"{end}.index.json" for end in _WEIGHTS))):
        return _weights_reason(name, lower)
    if re.search(r"(?:^|/)adapter_config\.json$", lower):
        return "an adapter configuration, which transformers would load"
    if path.stat().st_size > _LARGEST:
        return f"larger than {_LARGEST / 1e6:.0f} MB"
    return None


def _weights_reason(name: str, lower: str) -> str:
    if name == INDEX:
        return "the index of files that are not written"
    if lower.endswith((".safetensors", ".safetensors.index.json")):
        inside = "/" in name
        return f"weights {'in a folder' if inside else 'beside the model'}, without the adapter"
    return _OTHER_FORMAT


def _components(base: Path) -> tuple[str, ...]:
    """The folders of sentence-transformers' further layers, which have weights of their own."""
    try:
        modules: Any = json.loads((base / "modules.json").read_text(encoding="utf-8"))
        return tuple(f"{module['path']}/" for module in modules if module["path"])
    except (OSError, ValueError, TypeError, KeyError):
        return ()
