"""A finished run's adapter directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorakit import registry
from lorakit.adapters.model_card import CardFacts
from lorakit.adapters.peft_format import save_adapter
from lorakit.methods.base import Method
from lorakit.training.record import RunRecord
from lorakit.training.setup import Prepared, Say


def export_adapter(prepared: Prepared, directory: Path, record: RunRecord, say: Say) -> None:
    """Write what the model holds now, with its tokenizer and a card of the figures; ``say`` gets a
    line if PEFT cannot read it."""
    recipe = prepared.recipe
    hardware = record.hardware
    for leftover in directory.parent.glob(f".{directory.name}.*"):  # of a run that was killed here
        shutil.rmtree(leftover)
    save_adapter(
        directory,
        prepared.model,
        recipe.adapter,
        base_model_name_or_path=recipe.model.name_or_path,
        revision=recipe.model.revision,
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
            hardware=hardware.get("gpu") or hardware["cpu"],
        ),
        lorakit_info={"task": recipe.task.name},
    )
    method: Method = registry.methods()[recipe.adapter.method]
    if not method.peft_loads:
        say(
            f"{directory}: PEFT does not load what {method.name} trains; lorakit does, and "
            f"lorakit merge {recipe.model.name_or_path} {directory} OUT makes a plain model of it"
        )
