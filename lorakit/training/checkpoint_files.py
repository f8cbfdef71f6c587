"""The files of a checkpoint: tensors as safetensors, the rest as JSON, nothing pickled.

``manifest.json``, written last, has the size and the SHA-256 of each other file, so that a file
that is missing, cut or altered is noticed. Checkpoints of earlier versions have no manifest.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorakit.io.json_file import read_json_object
from lorakit.io.tensors import save_tensors

_MANIFEST = "manifest.json"
_STATE = "state.json"
_REQUIRED = ("weights", "method", "optimizer", "random")
_OPTIONAL = ("best",)
#: The version of state.json from which on a checkpoint has a manifest.
_VERSION = 2
#: No JSON file of a checkpoint comes near this; a larger one is not read.
_MAX_JSON_BYTES = 1 << 28
_CHUNK = 1 << 20


def write_files(
    directory: Path, tensors: Mapping[str, dict[str, Tensor]], state: dict[str, Any]
) -> None:
    """Write ``tensors`` as ``NAME.safetensors``, ``state`` as ``state.json``, and the manifest."""
    for name, values in tensors.items():
        save_tensors(values, directory / f"{name}.safetensors")
    _write_json(directory / _STATE, {"version": _VERSION, **state})
    _write_json(
        directory / _MANIFEST,
        {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(directory.iterdir())
        },
    )


def read_files(directory: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return what ``write_files`` wrote.

    Raises ValueError, which names the file, if one is missing, not a regular file, or not what the
    manifest says.
    """
    if not stat.S_ISDIR(directory.lstat().st_mode):
        raise ValueError("not a directory")
    listed = None
    if _exists(directory / _MANIFEST):
        listed = _read_json(directory / _MANIFEST)
        _verify(directory, listed)
    state = _read_json(directory / _STATE)
    if listed is None and state.pop("version", 1) != 1:
        raise ValueError(f"{_MANIFEST}: missing")
    optional = [name for name in _OPTIONAL if _exists(directory / f"{name}.safetensors")]
    tensors = {}
    for name in (*_REQUIRED, *optional):
        file = directory / f"{name}.safetensors"
        if listed is not None and file.name not in listed:
            raise ValueError(f"{file.name}: not in {_MANIFEST}")
        _size(file)
        try:
            tensors[name] = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file.name}: {error}") from error
    return tensors, state


def _verify(directory: Path, listed: Mapping[str, Any]) -> None:
    """Check the sizes of all files, which costs nothing, before reading any."""
    if _STATE not in listed:
        raise ValueError(f"{_MANIFEST}: {_STATE} is missing in it")
    for name, entry in listed.items():
        if Path(name).name != name or not isinstance(entry, dict):
            raise ValueError(f"{_MANIFEST}: not a list of files")
        size = _size(directory / name)
        if size != entry.get("bytes"):
            raise ValueError(f"{name}: {size} bytes, but {_MANIFEST} has {entry.get('bytes')}")
    for name, entry in listed.items():
        if _sha256(directory / name) != entry.get("sha256"):
            raise ValueError(f"{name}: its SHA-256 is not that in {_MANIFEST}")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _exists(file: Path) -> bool:
    return file.is_symlink() or file.exists()


def _size(file: Path) -> int:
    """The size of a regular file; raises ValueError for anything else, such as a pipe, from which
    reading might never end."""
    try:
        found = file.lstat()
    except FileNotFoundError as error:
        raise ValueError(f"{file.name}: missing") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file.name}: not a regular file")
    return found.st_size


def _read_json(file: Path) -> dict[str, Any]:
    if _size(file) > _MAX_JSON_BYTES:
        raise ValueError(f"{file.name}: too large")
    try:
        return read_json_object(file)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")
