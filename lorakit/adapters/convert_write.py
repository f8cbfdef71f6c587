"""What ``lorakit.convert`` writes: a PEFT directory, a copy of one, or a loralib file."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lorakit.adapters.beside import written_beside
from lorakit.adapters.checkpoint import TEMPLATES, TOKENIZER_FILES
from lorakit.adapters.files import CONFIG, PREFIX, SIDECAR, WEIGHTS
from lorakit.adapters.loralib import metadata
from lorakit.adapters.model_card import CardFacts, model_card
from lorakit.adapters.peft_config import without_defaults

_CARD = "README.md"


def write_peft(
    out: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    sidecar: Mapping[str, Any],
    source: Path,
    *,
    overwrite: bool,
) -> None:
    """A PEFT directory with the tokenizer of ``source``, and a card if the base is named."""
    with written_beside(out, replace=overwrite) as folder:
        for name, value in ((CONFIG, without_defaults(settings)), (SIDECAR, sidecar)):
            text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
            (folder / name).write_text(f"{text}\n", encoding="utf-8")
        stored = {PREFIX + name: value for name, value in tensors.items()}
        save_file(_own(stored), folder / WEIGHTS, metadata={"format": "pt"})
        _copy_tokenizer(source, folder)
        if settings.get("base_model_name_or_path"):
            card = model_card(_facts(settings, sidecar))
            (folder / _CARD).write_text(card, encoding="utf-8")


def copy_peft(out: Path, source: Path, *, overwrite: bool) -> None:
    """The adapter's own files, and nothing else that ``source`` may hold."""
    with written_beside(out, replace=overwrite) as folder:
        for name in (CONFIG, WEIGHTS, SIDECAR, _CARD):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        _copy_tokenizer(source, folder)


def write_loralib(
    out: Path,
    target: Path,
    tensors: Mapping[str, Tensor],
    told: Mapping[str, Any],
    *,
    overwrite: bool,
) -> None:
    """``target``, which is ``out`` or lies in it, with ``told`` in its metadata."""
    if target != out:
        with written_beside(out, replace=overwrite) as folder:
            save_file(_own(tensors), folder / target.name, metadata=metadata(told))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.parent / f".{target.name}.{secrets.token_hex(4)}.new"
    try:
        save_file(_own(tensors), new, metadata=metadata(told))
        with new.open("rb") as written:
            os.fsync(written.fileno())
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the order of their names, each in memory of its own."""
    return {name: tensors[name].clone().contiguous() for name in sorted(tensors)}


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES)


def _facts(settings: Mapping[str, Any], sidecar: Mapping[str, Any]) -> CardFacts:
    targets = settings["target_modules"]
    return CardFacts(
        settings["base_model_name_or_path"],
        "lora",
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        target_modules=[targets] if isinstance(targets, str) else targets,
        modules_to_save=settings.get("modules_to_save") or (),
        task=sidecar.get("task"),
        task_type=settings.get("task_type") or "CAUSAL_LM",
        num_labels=len(sidecar.get("id2label") or ()) or None,
        base_class=sidecar.get("base_class"),
        misread=sidecar.get("misread_by_peft") or (),
        refused=sidecar.get("refused_by_peft") or (),
    )
