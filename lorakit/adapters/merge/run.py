"""Folds an adapter into its base: ``lorakit.merge``.

The sum is computed in float32 and rounded once, to the output's dtype. The merged model keeps
everything else that the base has: tensors, settings and files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.base_model import base_section, dtype_name, other_base_note
from lorakit.adapters.merge.by_name import resolve_by_name
from lorakit.adapters.merge.checkpoint import SINGLE, Checkpoint, local_directory, read_config
from lorakit.adapters.merge.combine import Combination, combination_named, combined
from lorakit.adapters.merge.generation import add_eos
from lorakit.adapters.merge.output import (
    LeftOut,
    copy_files,
    create_files,
    plan_files,
    write_config,
)
from lorakit.adapters.merge.plan import MergePlan, plan_merge
from lorakit.adapters.merge.quantized import dequantization_note, open_checkpoint
from lorakit.adapters.merge.stream import write_tensors
from lorakit.adapters.merge.tokenizer import Tokenizer, choose_tokenizer
from lorakit.adapters.merge.updates import ResolvedBase, Weighted, read_weighted
from lorakit.adapters.merge.workers import OnProgress
from lorakit.adapters.peft.method import run_method_file
from lorakit.adapters.peft.read import AdapterFiles
from lorakit.errors import AdapterError, check_printable, file_size, os_reason, parse_size
from lorakit.io.atomic import atomic_directory
from lorakit.notes import Say, to_stderr
from lorakit.user_code import is_code

if TYPE_CHECKING:
    import torch

    from lorakit.recipe.sections import ModelSection


@dataclass(frozen=True)
class Added:
    """An adapter whose update was added, multiplied by ``weight``."""

    adapter: Path
    weight: float


@dataclass(frozen=True)
class MergeReport:
    """``weight`` is the factor of the adapter's own update, and ``combination`` tells how the
    adapters were combined; ``dtype`` is that of most weights.

    ``kept`` are tensors of the base that the trained class does not have, such as a vision tower:
    they are copied unchanged. ``left_out`` are files of the base that are not copied. ``notes`` say
    what may be unexpected.
    """

    directory: Path
    files: tuple[str, ...]
    merged_modules: int
    replaced_tensors: int
    dtype: str
    size_bytes: int
    weight: float = 1.0
    added: tuple[Added, ...] = ()
    combination: str = "cat"
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
    say: Say = to_stderr,
    add: Sequence[tuple[str | Path, float]] = (),
    weight: float = 1.0,
    on_progress: OnProgress = lambda _done, _total: None,
    method: str | os.PathLike[str] | None = None,
    density: float | None = None,
    svd_rank: int | None = None,
    majority_sign_method: str | None = None,
    seed: int | None = None,
) -> MergeReport:
    """Merge ``adapter`` into ``base`` and write ``out``, a directory that plain transformers loads.

    ``dtype`` of the output is by default that of each tensor in the base. ``out`` must not exist,
    unless ``overwrite``. ``say`` receives notes, ``on_progress`` the bytes written and the total.
    ``add`` are further adapters with their weights: W + ``weight`` * delta + sum of w_i * delta_i.
    Fully trained modules of ``adapter`` replace the base's; the added adapters have no others.

    ``method`` says how LoRA adapters are combined, as PEFT's ``combination_type``: ``linear``,
    ``svd`` (of rank ``svd_rank``), ``ties``, ``dare_linear``, ``dare_ties`` (``seed``) and
    ``magnitude_prune``, the last four with the share ``density`` of the values; ``cat`` is the sum.
    Or it is the ``FILE.py:CLASS`` of the user's method that trained the adapter; its code is run.
    Raises ModelError and AdapterError. ``out`` is then unchanged, also if the process is killed.
    """
    how = Combination(_combination_or_code(method), density, svd_rank, majority_sign_method, seed)
    how.check()
    adapters = read_weighted(adapter, weight, add, say)
    to_add = combined(adapters, how)
    files, out = adapters[0].files, Path(out)
    section = base_section(base, files, trust_remote_code)
    _check_out(out, section.name_or_path, adapters, overwrite)
    max_shard_bytes = parse_size(max_shard_size, "max_shard_size")
    output_dtype = dtype_name(dtype, "dtype")
    directory, settings = _base_directory(section, out)
    with open_checkpoint(directory, settings) as checkpoint:
        if (dequantized := dequantization_note(checkpoint, output_dtype)) is not None:
            output_dtype = output_dtype or "bfloat16"
            say(dequantized)
        resolved = resolve_base(section, settings, checkpoint, to_add)
        tokenizer = _tokenizer(directory, files, resolved, settings)
        plan = plan_merge(resolved, checkpoint, output_dtype)
        shards = plan_files(plan.outputs, checkpoint, plan.stored, max_shard_bytes)
        _check_disk(out, plan.size_bytes)
        with _write_errors(out), atomic_directory(out, replace=overwrite) as folder:
            metadata = {file.name: own for file, own in checkpoint.metadata.items()}
            places = create_files(folder, shards, plan.outputs, metadata)
            write_tensors(folder, plan, checkpoint, places, on_progress)
            write_config(folder, directory, resolved, plan, output_dtype, list(shards) != [SINGLE])
            weights = {file.relative_to(directory).as_posix() for file in checkpoint.files}
            left_out = copy_files(folder, directory, weights, tokenizer)
            eos_note = None if files.classifies else add_eos(folder, tokenizer, settings)
    notes = _notes(section, adapters, (*tokenizer.notes, eos_note), say)
    return _report(out, plan, adapters, how.name, list(shards), left_out, notes)


def _base_directory(section: ModelSection, out: Path) -> tuple[Path, dict[str, Any]]:
    """Return the base's directory, which for a Hub id is its snapshot in the cache, and its
    configuration; raise ModelError or AdapterError if it cannot be merged to ``out``."""
    directory = local_directory(section)
    _check_outside(out, "base", directory)
    settings = read_config(directory)
    return directory, settings


def _combination_or_code(method: str | os.PathLike[str] | None) -> str:
    """The name of the combination; ``cat`` for the file of a user's method, which is run."""
    if method is None or is_code(os.fspath(method)):
        run_method_file(method)
        return "cat"
    return combination_named(os.fspath(method))


def _tokenizer(
    directory: Path, files: AdapterFiles, resolved: ResolvedBase, settings: Mapping[str, Any]
) -> Tokenizer:
    rows = resolved.vocab_size or _vocabulary_size(settings)
    return choose_tokenizer(directory, files.directory, needs_pad=files.classifies, rows=rows)


def resolve_base(
    section: ModelSection,
    settings: Mapping[str, Any],
    checkpoint: Checkpoint,
    adapters: Sequence[Weighted],
) -> ResolvedBase:
    """Find the stored tensors that the adapters change. Raises AdapterError if one does not fit."""
    resolved = resolve_by_name(settings, checkpoint, adapters)
    if resolved is None:
        # Takes seconds to import, which most merges do without.
        from lorakit.adapters.merge.by_class import resolve_by_class

        resolved = resolve_by_class(section, settings, checkpoint, adapters)
    return resolved


def _notes(
    section: ModelSection, adapters: Sequence[Weighted], own: Sequence[str | None], say: Say
) -> tuple[str, ...]:
    """Say and return the merge's ``own`` notes and those about other bases."""
    others = (other_base_note(section, given.files) for given in adapters)
    notes = tuple(note for note in (*own, *others) if note is not None)
    for note in notes:
        say(note)
    return notes


def _report(
    out: Path,
    plan: MergePlan,
    adapters: Sequence[Weighted],
    combination: str,
    files: Sequence[str],
    left_out: Sequence[LeftOut],
    notes: Sequence[str],
) -> MergeReport:
    first, *others = adapters
    return MergeReport(
        directory=out,
        files=tuple(files),
        merged_modules=plan.merged_modules,
        replaced_tensors=plan.replaced_tensors,
        dtype=plan.dtype,
        size_bytes=plan.size_bytes,
        weight=first.weight,
        added=tuple(Added(other.files.directory, other.weight) for other in others),
        combination=combination,
        kept=plan.kept,
        left_out=tuple(left_out),
        notes=tuple(notes),
    )


@contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    """Turn an OSError (disk full, name too long, a parent that is a file) into an AdapterError."""
    try:
        yield
    except OSError as error:
        raise AdapterError(f"OUT = {out}: not written: {os_reason(error)}") from error


def _check_out(out: Path, base: str, adapters: Sequence[Weighted], overwrite: bool) -> None:
    with _write_errors(out):
        _check_outside(out, "base", Path(base))
        for given in adapters:
            _check_outside(out, "adapter", given.files.directory)
        _check_free(out, overwrite)


def _check_free(out: Path, overwrite: bool) -> None:
    check_printable(out, "OUT =")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise AdapterError(f"OUT = {out}: exists and is not a directory")
    if out.exists() and not overwrite:
        raise AdapterError(
            f"OUT = {out}: already exists; hint: choose another, or pass --overwrite"
        )
    if out.exists() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise AdapterError(f"OUT = {out}: not empty and not a model; not replaced")


def _check_outside(out: Path, what: str, path: Path) -> None:
    """Raise AdapterError if ``out`` is the directory ``path``, inside it or a parent of it."""
    if not path.is_dir():
        return
    target, other = out.resolve(), path.resolve()
    if target == other or other in target.parents:
        raise AdapterError(f"OUT = {out}: must be outside the {what}'s directory {path}")
    if target in other.parents:
        raise AdapterError(
            f"OUT = {out}: contains the {what}'s directory {path}; hint: choose another"
        )


def _vocabulary_size(settings: Mapping[str, Any]) -> int | None:
    parts = (settings, settings.get("text_config"))
    sizes = [part.get("vocab_size") for part in parts if isinstance(part, Mapping)]
    return next((size for size in sizes if isinstance(size, int)), None)


def _check_disk(out: Path, size_bytes: int) -> None:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise AdapterError(f"OUT = {out}: {parent} is not writable")
    free = shutil.disk_usage(parent).free
    if free < size_bytes:
        raise AdapterError(
            f"OUT = {out}: not enough disk space: {file_size(size_bytes)} needed, "
            f"{file_size(free)} free"
        )
