"""A finished run's adapter directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorakit import registry
from lorakit.adapters.model_card import CardFacts
from lorakit.adapters.names import BaseNames, names_in_base
from lorakit.adapters.peft_config import (
    misread_by_peft,
    misread_note,
    refused_by_peft,
    refused_note,
)
from lorakit.adapters.peft_format import save_adapter
from lorakit.errors import AdapterError
from lorakit.methods.base import Method
from lorakit.models.load import load_config
from lorakit.training.record import RunRecord
from lorakit.training.setup import Prepared, Say


def export_adapter(prepared: Prepared, directory: Path, record: RunRecord, say: Say) -> None:
    """Write what the model holds now, with its tokenizer and a card of the figures; ``say`` gets a
    line if PEFT cannot read it."""
    recipe = prepared.recipe
    hardware = record.hardware
    labels = prepared.task.labels(recipe.task, None)
    for leftover in directory.parent.glob(f".{directory.name}.*"):  # of a run that was killed here
        shutil.rmtree(leftover)
    save_adapter(
        directory,
        prepared.model,
        recipe.adapter,
        base_model_name_or_path=recipe.model.name_or_path,
        revision=recipe.model.revision,
        names=_names(prepared, directory, say),
        task_type="CAUSAL_LM" if prepared.task.kind == "causal" else "SEQ_CLS",
        modules_to_save=prepared.report.modules_to_save,
        tokenizer=prepared.tokenizer,
        card=CardFacts(
            base_model=recipe.model.name_or_path,
            method=recipe.adapter.method,
            task=recipe.task.name,
            data_rows=prepared.data["train"]["rows"],
            metrics=record.metrics,
            steps=record.steps,
            seconds=record.seconds,
            diverged=record.diverged,
            hardware=hardware.get("gpu") or hardware["cpu"],
        ),
        lorakit_info={"task": recipe.task.name} | ({"labels": labels} if labels else {}),
    )
    method: Method = registry.methods()[recipe.adapter.method]
    merging = f"lorakit merge {recipe.model.name_or_path} {directory} OUT makes a plain model of it"
    if not method.peft_loads:
        say(
            f"{directory}: PEFT does not load what {method.name} trains; lorakit does, and "
            f"{merging}"
        )
    elif refused := refused_by_peft(prepared.model, _adapted(record)):
        say(f"{directory}: {refused_note(refused)}, and {merging}")
    elif method.peft_type == "LORA" and (
        wrong := misread_by_peft(prepared.model, _adapted(record))
    ):
        say(f"{directory}: {misread_note(wrong)}, and {merging}")


def _adapted(record: RunRecord) -> list[str]:
    return [module["name"] for module in record.adapted_modules]


def _names(prepared: Prepared, directory: Path, say: Say) -> BaseNames | None:
    """Names that fit the base's own class, where another was trained."""
    if prepared.task.kind != "causal":
        return None
    own = type(prepared.model).__name__
    try:
        names = names_in_base(prepared.model, load_config(prepared.recipe.model))
    except AdapterError as error:
        say(f"{directory}: the names are those of {own}: with PEFT load the base as that ({error})")
        return None
    if names is not None:
        say(
            f"{directory}: trained as {own}; the names are those of the base's own class, "
            f"{type(names.own).__name__}: with PEFT load the base as that"
        )
    return names
