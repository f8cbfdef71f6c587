"""W + delta, folded into the base: ``lorakit.merge``.

The sum is taken in float32 and rounded once, to the output's dtype. What else the base has, the
merged model has too: tensors, settings and files."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.merge.checkpoint import SINGLE, Checkpoint, local_directory, read_config
from lorakit.adapters.merge.files import LeftOut, copy_files, write_config
from lorakit.adapters.merge.plan import plan_merge
from lorakit.adapters.merge.quick import held_by_name
from lorakit.adapters.merge.shards import create_files, parse_size, plan_files
from lorakit.adapters.merge.stream import write_tensors
from lorakit.adapters.merge.tokenizer import choose_tokenizer
from lorakit.adapters.merge.updates import Held, Weighted, read_weighted
from lorakit.adapters.merge.workers import OnProgress
from lorakit.adapters.peft.read import (
    base_section,
    dtype_name,
    other_base_note,
    run_method_file,
)
from lorakit.errors import AdapterError
from lorakit.io.atomic import atomic_directory

if TYPE_CHECKING:
    import torch

    from lorakit.recipe.sections import ModelSection


@dataclass(frozen=True)
class Added:
    """An adapter whose update was added, times ``weight``."""

    adapter: Path
    weight: float


@dataclass(frozen=True)
class MergeReport:
    """``weight`` is the factor of the adapter's own update; ``dtype`` is that of most weights.

    ``kept`` are the base's tensors that the class lorakit trains does not hold (a vision tower):
    they are written as they are. ``left_out`` are the base's files that are not written. ``notes``
    say what was done otherwise than the user may expect."""

    directory: Path
    files: tuple[str, ...]
    merged_modules: int
    replaced_tensors: int
    dtype: str
    size_bytes: int
    weight: float = 1.0
    added: tuple[Added, ...] = ()
    kept: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
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
    on_progress: OnProgress = lambda _done, _total: None,
    method: str | None = None,
) -> MergeReport:
    """Fold ``adapter`` into ``base``; ``out`` becomes a directory that plain transformers loads.

    ``dtype`` of the output is by default each tensor's own in the base. ``out`` must not exist,
    unless ``overwrite``. ``say`` gets a line for what the user should know, ``on_progress`` the
    bytes written and the bytes in all. ``add`` are further adapters with their weights:
    W + ``weight`` * delta + sum of w_i * delta_i. What ``adapter`` trained whole, a head say, is
    taken as it is, and the added ones must have none of their own. ``method`` is the
    ``FILE.py:CLASS`` of the user's method that trained the adapter; its code is run.
    Raises ModelError and AdapterError; then, and if the process is killed, ``out`` is as it was.
    """
    run_method_file(method)
    adapters = read_weighted(adapter, weight, add, say)
    files = adapters[0].files
    section = base_section(base, files, trust_remote_code)
    out = Path(out)
    with _explained(out):
        _check_out(out, section.name_or_path, adapters, overwrite)
    max_shard_bytes = parse_size(max_shard_size)
    wanted = dtype_name(dtype, "dtype")
    directory = local_directory(section)
    _check_outside(out, "base", directory)  # a Hub id's, in the cache
    settings = read_config(directory)
    _check_not_quantised(settings, section.name_or_path)
    tokenizer = choose_tokenizer(
        directory, files.directory, needs_pad=files.classifies, rows=_vocabulary_size(settings)
    )
    with Checkpoint(directory) as checkpoint:
        held = _held(section, settings, checkpoint, adapters)
        plan = plan_merge(held, checkpoint, wanted)
        shards = plan_files(plan.outputs, checkpoint, plan.stored, max_shard_bytes)
        size_bytes = sum(output.size_bytes for output in plan.outputs.values())
        _check_disk(out, size_bytes)
        metadata = {file.name: own for file, own in checkpoint.metadata.items()}
        with _explained(out), atomic_directory(out, replace=overwrite) as folder:
            places = create_files(folder, shards, plan.outputs, metadata)
            write_tensors(folder, plan, checkpoint, places, on_progress)
            write_config(folder, directory, held, plan, wanted, list(shards) != [SINGLE])
            weights = {file.relative_to(directory).as_posix() for file in checkpoint.files}
            left_out = copy_files(folder, directory, weights, tokenizer)
    others = (other_base_note(section, given.files) for given in adapters)
    notes = [*tokenizer.notes, *(note for note in others if note is not None)]
    for note in notes:
        say(note)
    return MergeReport(
        directory=out,
        files=tuple(shards),
        merged_modules=plan.merged_modules,
        replaced_tensors=plan.replaced_tensors,
        dtype=plan.dtype,
        size_bytes=size_bytes,
        kept=plan.kept,
        left_out=tuple(left_out),
        notes=tuple(notes),
        **_weights(adapters),
    )


def _held(
    section: ModelSection,
    settings: Mapping[str, Any],
    checkpoint: Checkpoint,
    adapters: Sequence[Weighted],
) -> Held:
    held = held_by_name(settings, checkpoint, adapters)
    if held is None:
        # Seconds of imports, which most merges do without.
        from lorakit.adapters.merge.by_class import held_by_class

        held = held_by_class(section, settings, checkpoint, adapters)
    return held


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """A full disk, a name that is too long, a file among the parents: AdapterError."""
    try:
        yield
    except OSError as error:
        raise AdapterError(f"OUT = {out}: not written: {error}") from error


def _weights(adapters: Sequence[Weighted]) -> dict[str, Any]:
    first, *others = adapters
    added = tuple(Added(other.files.directory, other.weight) for other in others)
    return {"weight": first.weight, "added": added}


def _check_out(out: Path, base: str, adapters: Sequence[Weighted], overwrite: bool) -> None:
    _check_outside(out, "base", Path(base))
    for given in adapters:
        _check_outside(out, "adapter", given.files.directory)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise AdapterError(f"OUT = {out}: exists and is not a directory")
    if out.exists() and not overwrite:
        raise AdapterError(f"OUT = {out}: exists already; give another, or --overwrite it")
    if out.exists() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise AdapterError(f"OUT = {out}: holds something other than a model; it is not replaced")


def _check_outside(out: Path, what: str, path: Path) -> None:
    """Raise AdapterError if ``out`` is the directory ``path``, lies in it or holds it."""
    if not path.is_dir():
        return
    target, other = out.resolve(), path.resolve()
    if target == other or other in target.parents:
        raise AdapterError(f"OUT = {out}: must lie outside the {what}'s directory {path}")
    if target in other.parents:
        raise AdapterError(f"OUT = {out}: holds the {what}'s directory {path}; give another")


def _vocabulary_size(settings: Mapping[str, Any]) -> int | None:
    parts = (settings, settings.get("text_config"))
    sizes = [part.get("vocab_size") for part in parts if isinstance(part, Mapping)]
    return next((size for size in sizes if isinstance(size, int)), None)


def _check_not_quantised(settings: Mapping[str, Any], base: str) -> None:
    parts = [settings, *(part for part in settings.values() if isinstance(part, Mapping))]
    if any(part.get("quantization_config") for part in parts):
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
            f"OUT = {out}: {_size(size_bytes)} are needed, and {_size(free)} are free"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
