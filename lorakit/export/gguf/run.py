"""Exports a model or an adapter as GGUF: ``lorakit.export_gguf``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lorakit.adapters.merge.checkpoint import local_directory
from lorakit.adapters.merge.workers import OnProgress
from lorakit.adapters.peft.locate import (
    adapter_directory,
    is_hub_adapter,
    is_read_as_adapter,
)
from lorakit.adapters.peft.read import read_adapter
from lorakit.errors import AdapterError, ModelError, UserError, os_reason
from lorakit.export.gguf.adapter import DTYPES as ADAPTER_DTYPES
from lorakit.export.gguf.adapter import write_adapter
from lorakit.export.gguf.encode import check_dtype, require_gguf
from lorakit.export.gguf.model import write_model
from lorakit.io.atomic import atomic_file, check_name, writing
from lorakit.notes import Say, to_stderr
from lorakit.recipe.sections import ModelSection


@dataclass(frozen=True)
class GgufReport:
    """``kind`` is ``model`` or ``adapter``; ``dtype`` the type of most values. ``notes`` say what
    may be unexpected."""

    path: Path
    kind: str
    tensors: int
    dtype: str
    size_bytes: int
    notes: tuple[str, ...] = ()


def export_gguf(
    source: str | Path,
    out: str | Path,
    dtype: str | None = None,
    *,
    base: str | None = None,
    overwrite: bool = False,
    say: Say = to_stderr,
    on_progress: OnProgress = lambda _done, _total: None,
) -> GgufReport:
    """Write the model or adapter ``source`` to the file ``out`` for llama.cpp.

    ``dtype`` is ``f32``, ``f16``, ``bf16`` or, of a model, ``q8_0``; by default that of the model's
    weights, and ``f32`` for an adapter. ``base`` replaces the base model that an adapter names, of
    which only the configuration is read. One tensor is in memory at a time. ``say`` receives notes.
    Raises UserError if the package gguf is missing, ModelError and AdapterError for what llama.cpp
    does not support, WriteFailed if the disk is full. ``out`` is then unchanged.
    """
    out = Path(out)
    require_gguf()
    is_adapter = _is_adapter(source)
    check_dtype(dtype, ADAPTER_DTYPES) if is_adapter else check_dtype(dtype)
    if base is not None and not is_adapter:
        raise UserError(f"--base = {base}: allowed: with an adapter; {source} is a model")
    _check_out(out, overwrite)
    with writing(f"OUT = {out}"), atomic_file(out) as file:
        if is_adapter:
            files = read_adapter(source, say)
            written = write_adapter(files, base, file, dtype, on_progress)
        else:
            with _of_the_model():
                directory = local_directory(ModelSection(name_or_path=str(source)))
                written = write_model(directory, file, dtype, on_progress)
    for note in written.notes:
        say(note)
    kind = "adapter" if is_adapter else "model"
    return GgufReport(out, kind, written.tensors, written.dtype, written.size_bytes, written.notes)


@contextmanager
def _of_the_model() -> Iterator[None]:
    """Start an error without the word with which a merge names its base."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).removeprefix("base: ")) from error


def _is_adapter(source: str | Path) -> bool:
    """Whether ``source`` is an adapter. Of an id on the Hub, the adapter's files are downloaded."""
    directory = Path(source)
    if directory.is_dir():
        return is_read_as_adapter(directory)
    if not is_hub_adapter(source):
        return False
    with suppress(AdapterError):  # a repository without an adapter
        return bool(adapter_directory(source))
    return False


def _check_out(out: Path, overwrite: bool) -> None:
    if out.suffix != ".gguf":
        raise AdapterError(f"OUT = {out}: allowed: a file whose name ends with .gguf")
    if out.is_dir():
        raise AdapterError(f"OUT = {out}: is a directory; allowed: a file")
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise AdapterError(
            f"OUT = {out}: already exists; hint: choose another, or pass --overwrite"
        )
    if not out.absolute().parent.is_dir():
        raise AdapterError(f"OUT = {out}: directory {out.absolute().parent} does not exist")
    try:
        check_name(out)
    except (OSError, ValueError) as error:
        raise AdapterError(f"OUT = {out}: not written: {os_reason(error)}") from error
