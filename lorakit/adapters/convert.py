"""Converts an adapter to another format, without the base model: ``lorakit.convert``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.adapters.loralib import loralib_tensors, write_state
from lorakit.adapters.loralib_read import LoralibOptions, read_loralib
from lorakit.adapters.low_rank import (
    Updates,
    lora_files,
    number,
    read_products,
    read_updates,
)
from lorakit.adapters.merge.tokenizer import TEMPLATES, TOKENIZER_FILES
from lorakit.adapters.model_card import CardFacts
from lorakit.adapters.peft.locate import adapter_directory, is_hub_adapter
from lorakit.adapters.peft.method import merge_command
from lorakit.adapters.peft.read import AdapterFiles, read_adapter
from lorakit.adapters.peft.schema import (
    CARD,
    CONFIG,
    LORA_FORMATS,
    PREFIX,
    SIDECAR,
    WEIGHTS,
    without_defaults,
)
from lorakit.adapters.peft.targets import misread_note, refused_note
from lorakit.adapters.peft.write import card_usage, write_card, write_files
from lorakit.adapters.vllm import padded
from lorakit.errors import AdapterError, check_printable, os_reason, shown
from lorakit.io.atomic import atomic_directory, atomic_file
from lorakit.io.tensors import save_tensors
from lorakit.notes import Say, to_stderr

FORMS = ("lora", "loralib", "peft")
#: The file that ``--to loralib`` writes if OUT is a directory.
LORALIB_FILE = "lora.safetensors"


@dataclass(frozen=True)
class ConvertReport:
    """``path`` is the directory or loralib file that was written. ``r`` and ``lora_alpha`` are
    those of its format: a number, or name -> number if they differ; None for a copy. ``notes`` say
    what may be unexpected."""

    path: Path
    to: str
    matrices: int
    r: int | dict[str, int] | None
    lora_alpha: float | dict[str, float] | None
    size_bytes: int
    notes: tuple[str, ...] = ()


def convert(
    adapter: str | Path,
    out: str | Path,
    to: str,
    *,
    rank: int | None = None,
    lora_alpha: float | None = None,
    enable_lora: Sequence[str] = (),
    embedding: Sequence[str] = (),
    base_model: str | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    overwrite: bool = False,
    say: Say = to_stderr,
) -> ConvertReport:
    """Convert ``adapter``, a directory or a loralib checkpoint, to the format ``to``, and write
    ``out``.

    ``lora``: a PEFT directory of a plain LoRA with one rank R and one lora_alpha, which vLLM
    supports as well; R is ``rank``, or the smallest of 1, 8, 16, 32, 64, 128, 256, 320 and 512 that
    fits all. ``peft``: a PEFT directory with the same ranks; a directory that PEFT loads already is
    copied. ``loralib``: one safetensors file, ``out`` or ``out``/lora.safetensors, for
    ``load_state_dict(..., strict=False)``; its metadata has the layers' r and lora_alpha.

    ``lora_alpha`` to ``fan_in_fan_out`` supply what a loralib checkpoint lacks: see
    ``LoralibOptions``. Pickled checkpoints (.pt, .pth, .bin) are read without running their code.
    ``out`` must not exist, unless ``overwrite``. ``say`` receives notes.
    Raises AdapterError. ``out`` is then unchanged, also if the process is killed.
    """
    options = LoralibOptions(
        lora_alpha, enable_lora, embedding, base_model, task_type, fan_in_fan_out
    )
    source, out = Path(adapter), Path(out)
    if not source.exists() and is_hub_adapter(adapter):
        source = adapter_directory(adapter)
    checkpoint = _checkpoint(source)
    _check_arguments(to, rank, options, checkpoint)
    target = out / LORALIB_FILE if to == "loralib" and out.suffix != ".safetensors" else out
    try:
        _check_out(out, source, target, overwrite)
        if checkpoint:
            updates, notes = read_loralib(checkpoint, options)
        else:
            merge = merge_command(base_model, source, "FILE.py:CLASS")
            hint = f"it cannot be converted; {merge} writes a plain model instead"
            files = read_adapter(source, say, hint)
            if to == "peft":
                report = _copied(files, out, overwrite)
                say(report.notes[0])
                return report
            updates, notes = read_updates(files), _folding_notes(files)
        report = _written(updates, notes, source, out, target, to, rank, overwrite)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"OUT = {out}: not written: {os_reason(error)}") from error
    for note in report.notes:
        say(note)
    return report


def _written(
    updates: Updates,
    notes: list[str],
    source: Path,
    out: Path,
    target: Path,
    to: str,
    rank: int | None,
    overwrite: bool,
) -> ConvertReport:
    count = len(updates.matrices)
    if to == "loralib":
        state, facts, more = loralib_tensors(updates)
        _write_loralib(out, target, state, facts, overwrite=overwrite)
        r, alpha, notes = facts["r"], facts["lora_alpha"], notes + more
        return ConvertReport(target, to, count, r, alpha, _size(target), tuple(notes))
    if to == "lora":
        updates, more = padded(updates, rank)
        notes = notes + more
    settings, tensors, sidecar = lora_files(updates)
    if misread := sidecar.get("misread_by_peft"):
        notes = [*notes, misread_note(misread)]
    if refused := sidecar.get("refused_by_peft"):
        notes = [*notes, refused_note(refused)]
    _write_peft(out, settings, tensors, sidecar, source, overwrite=overwrite)
    ranks = {name: matrix.r for name, matrix in updates.matrices.items()}
    alphas = {name: number(m.scaling * m.r) for name, m in updates.matrices.items()}
    r = ranks if settings["rank_pattern"] else settings["r"]
    alpha = alphas if settings["alpha_pattern"] else settings["lora_alpha"]
    return ConvertReport(out, to, count, r, alpha, _size(out), tuple(notes))


def _checkpoint(source: Path) -> Path | None:
    """The loralib file that ``source`` is, or contains as written by ``--to loralib``."""
    if not source.exists():
        raise AdapterError(f"{source}: no such adapter directory or loralib checkpoint")
    if source.is_file():
        return source
    inside = source / LORALIB_FILE
    return inside if inside.is_file() and not (source / CONFIG).exists() else None


def _check_arguments(
    to: str, rank: int | None, options: LoralibOptions, checkpoint: Path | None
) -> None:
    if to not in FORMS:
        raise AdapterError(f"--to = {to}: allowed: {', '.join(FORMS)}")
    if rank is not None and (to != "lora" or rank < 1):
        allowed = "an integer from 1" if to == "lora" else "with --to lora only"
        raise AdapterError(f"--rank = {rank}: allowed: {allowed}")
    if options.task_type not in (None, "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"):
        raise AdapterError(
            f"--task-type = {options.task_type}: allowed: CAUSAL_LM, SEQ_CLS, TOKEN_CLS"
        )
    if checkpoint and to == "loralib":
        raise AdapterError(f"{checkpoint}: is a loralib checkpoint; allowed: --to peft, --to lora")
    for name, value in vars(options).items():
        if not checkpoint and value not in (None, (), [], False):
            option = f"--{name.replace('_', '-')}"
            raise AdapterError(
                f"{option} = {shown(value)}: allowed: for a loralib checkpoint only; an adapter "
                "directory already has it"
            )


def _check_out(out: Path, source: Path, target: Path, overwrite: bool) -> None:
    check_printable(out, "OUT =")
    resolved, adapter = out.resolve(), source.resolve()
    if resolved == adapter or adapter in resolved.parents or resolved in adapter.parents:
        raise AdapterError(f"OUT = {out}: must be outside of ADAPTER = {source}")
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise AdapterError(
            f"OUT = {out}: already exists; hint: choose another, or pass --overwrite"
        )
    if out == target and target.suffix == ".safetensors" and out.is_file():
        replaceable = _is_loralib(out)
    elif out.is_symlink() or not out.is_dir():
        raise AdapterError(f"OUT = {out}: exists and is not a directory")
    else:
        names = {path.name for path in out.iterdir()}
        replaceable = names <= {LORALIB_FILE} if target != out else not names or CONFIG in names
    if not replaceable:
        raise AdapterError(f"OUT = {out}: not empty and not an adapter; not replaced")


def _is_loralib(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return any(name.endswith(".lora_A") for name in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _folding_notes(files: AdapterFiles) -> list[str]:
    adalora = files.config["peft_type"] == "ADALORA"
    return ["AdaLoRA's Lambda is folded into A"] if adalora else []


def _copied(files: AdapterFiles, out: Path, overwrite: bool) -> ConvertReport:
    if not files.method.peft_loads:
        base = files.config.get("base_model_name_or_path")
        merge = merge_command(base, files.directory, files.method.name)
        raise AdapterError(
            f"{files.directory}: PEFT does not support {files.method.name}; hint: {merge} writes a "
            "plain model instead"
        )
    if files.config["peft_type"] in LORA_FORMATS:
        read_products(files)  # raises an error for tensors that PEFT could not load
    _copy_peft(out, files, overwrite=overwrite)
    note = f"{files.directory} already has PEFT's format: copied unchanged"
    if files.has_raw_names:
        note = f"{files.directory}: copied, with the tensor names that PEFT saves"
    matrices = {key.partition(".lora_")[0] for key in files.tensors if ".lora_" in key}
    return ConvertReport(out, "peft", len(matrices), None, None, _size(out), (note,))


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _write_peft(
    out: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    source: Path,
    *,
    overwrite: bool,
) -> None:
    """Write a PEFT directory with the tokenizer of ``source``, and a card if the base is named."""
    base = settings.get("base_model_name_or_path")
    stored = {PREFIX + name: value for name, value in tensors.items()}
    settings = without_defaults(settings)
    with atomic_directory(out, replace=overwrite) as folder:
        write_files(folder, settings, _copied_tensors(stored), info)
        if base:
            has_tokenizer = (source / "tokenizer.json").is_file()
            use = card_usage(out, "lora", settings, info, has_tokenizer)
            write_card(folder, CardFacts(base, "lora", task=info.get("task")), settings, use)
        _copy_tokenizer(source, folder)


def _copy_peft(out: Path, files: AdapterFiles, *, overwrite: bool) -> None:
    """Copy the adapter's own files, but no others that its directory may contain."""
    source = files.directory
    with atomic_directory(out, replace=overwrite) as folder:
        for name in (CONFIG, WEIGHTS, SIDECAR, CARD):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if files.has_raw_names:
            save_tensors({f"{PREFIX}{n}": t for n, t in files.tensors.items()}, folder / WEIGHTS)
        _copy_tokenizer(source, folder)


def _write_loralib(
    out: Path,
    target: Path,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    overwrite: bool,
) -> None:
    """Write ``target``, which is ``out`` or inside it, with ``facts`` in its metadata."""
    if target != out:
        with atomic_directory(out, replace=overwrite) as folder:
            write_state(folder / target.name, _copied_tensors(tensors), facts)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as file:
        write_state(file, _copied_tensors(tensors), facts)


def _copied_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors, since those that share memory cannot be saved, and sort them by name."""
    return {name: tensors[name].clone().contiguous() for name in sorted(tensors)}


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES)
