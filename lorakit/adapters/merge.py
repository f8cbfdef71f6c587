"""W + delta, folded into the base shard by shard: ``lorakit.merge``.

The sum is taken in float32 and rounded once, to the output's dtype. At most one output file and one
matrix are in memory.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from lorakit.adapters.base_model import base_section, empty_model, full_config, set_pad_token
from lorakit.adapters.beside import written_beside
from lorakit.adapters.checkpoint import (
    TEMPLATES,
    TOKENIZER_FILES,
    Checkpoint,
    local_directory,
)
from lorakit.adapters.load import dtype_name
from lorakit.adapters.merge_loaded import merge_loaded
from lorakit.adapters.merge_plan import MergePlan, NotByName, part_embeddings, plan_merge
from lorakit.adapters.shards import parse_size, write_shards
from lorakit.adapters.weighted import Weighted, read_weighted
from lorakit.errors import AdapterError


@dataclass(frozen=True)
class Added:
    """An adapter whose update was added, times ``weight``."""

    adapter: Path
    weight: float


@dataclass(frozen=True)
class MergeReport:
    """``weight`` is the factor of the adapter's own update; ``dtype`` is that of most weights;
    ``unused`` are the base's tensors that the model has no place for; ``notes`` say what was done
    otherwise than the user may expect."""

    directory: Path
    files: tuple[str, ...]
    merged_modules: int
    replaced_tensors: int
    dtype: str
    size_bytes: int
    weight: float = 1.0
    added: tuple[Added, ...] = ()
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def merge(
    base: str | Path | None,
    adapter: str | Path,
    out: str | Path,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    add: Sequence[tuple[str | Path, float]] = (),
    weight: float = 1.0,
) -> MergeReport:
    """Fold ``adapter`` into ``base``; ``out`` becomes a directory that plain transformers loads.

    ``dtype`` of the output is by default each tensor's own in the base. ``out`` must not exist,
    unless ``overwrite``. ``say`` gets a line for what the user should know. ``add`` are further
    adapters with their weights: W + ``weight`` * delta + sum of w_i * delta_i. What ``adapter``
    trained whole, a head say, is taken as it is, and the added ones must have none of their own.
    Raises ModelError and AdapterError; then, and if the process is killed, ``out`` is as it was.
    """
    adapters = read_weighted(adapter, weight, add)
    files = adapters[0].files
    section = base_section(base, files, trust_remote_code)
    out = Path(out)
    with _explained(out):
        _check_out(out, section.name_or_path, adapters, overwrite)
    max_shard_bytes = parse_size(max_shard_size)
    wanted = dtype_name(dtype, "dtype")
    config = full_config(section, files)
    _check_not_quantised(config, section.name_or_path)
    directory = local_directory(section)
    try:
        model = empty_model(config, files, trust_remote_code)
        set_pad_token(config, model, files)
        plan = plan_merge(model, Checkpoint(directory), adapters, wanted)
    except NotByName as reason:
        note = f"{reason}: the whole model is loaded and merged in memory"
        say(note)
        _check_disk(out, sum(file.stat().st_size for file in directory.glob("*.safetensors")))
        with _explained(out), written_beside(out, replace=overwrite) as folder:
            fields = merge_loaded(section, config, adapters, folder, wanted, max_shard_bytes)
            _copy_rest(folder, directory, files.directory)
        return MergeReport(out, **fields, **_weights(adapters), notes=(note,))
    sources = (directory, files.directory)
    fields = _write(plan, config, out, max_shard_bytes, overwrite, sources)
    return MergeReport(out, **fields, **_weights(adapters))


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """A full disk, a name that is too long, a file among the parents: AdapterError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"OUT = {out}: not written: {error}") from error


def _weights(adapters: Sequence[Weighted]) -> dict[str, Any]:
    first, *others = adapters
    added = tuple(Added(other.files.directory, other.weight) for other in others)
    return {"weight": first.weight, "added": added}


def _write(
    plan: MergePlan,
    config: PreTrainedConfig,
    out: Path,
    max_shard_bytes: int,
    overwrite: bool,
    sources: tuple[Path, Path],
) -> dict[str, Any]:
    """Returns the fields of a MergeReport."""
    size_bytes = sum(output.size_bytes for output in plan.outputs.values())
    _check_disk(out, size_bytes)
    with _explained(out), written_beside(out, replace=overwrite) as folder:
        names = write_shards(folder, plan.outputs, max_shard_bytes, plan.value)
        config.architectures = [plan.architecture]
        config.dtype = plan.dtype
        if plan.untied:
            part_embeddings(config)
        config.save_pretrained(folder)
        _copy_rest(folder, *sources)
    return {
        "files": tuple(names),
        "merged_modules": len(plan.adapted),
        "replaced_tensors": len(plan.given),
        "dtype": plan.dtype,
        "size_bytes": size_bytes,
        "unused": plan.unused,
    }


def _check_out(out: Path, base: str, adapters: Sequence[Weighted], overwrite: bool) -> None:
    target = out.resolve()
    inputs = [("base", Path(base)), *(("adapter", given.files.directory) for given in adapters)]
    for what, path in inputs:
        if not path.is_dir():
            continue
        other = path.resolve()
        if target == other or other in target.parents or target in other.parents:
            raise AdapterError(f"OUT = {out}: must lie outside the {what}'s directory {path}")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise AdapterError(f"OUT = {out}: exists and is not a directory")
    if out.exists() and not overwrite:
        raise AdapterError(f"OUT = {out}: exists already; give another, or --overwrite it")
    if out.exists() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise AdapterError(f"OUT = {out}: holds something other than a model; it is not replaced")


def _check_not_quantised(config: PreTrainedConfig, base: str) -> None:
    if getattr(config, "quantization_config", None):
        raise AdapterError(
            f"base {base}: its weights are quantised, and merging would round the adapter away; "
            "merge into the original weights"
        )


def _check_disk(out: Path, size_bytes: int) -> None:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise AdapterError(f"OUT = {out}: {parent} is not writable")
    free = shutil.disk_usage(parent).free
    if free < size_bytes:
        raise AdapterError(
            f"OUT = {out}: {size_bytes / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free"
        )


def _copy_rest(folder: Path, base: Path, adapter: Path) -> None:
    """Tokenizer and chat template of the adapter if it has them, generation defaults, and the
    code of a base that brings its own."""
    has_own = any(
        (adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    source = adapter if has_own else base
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES)
    for file in (base / "generation_config.json", *base.glob("*.py")):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
