"""The adapter that a run writes: its files, and what other tools make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.adapters.model_card import CardFacts
from lorakit.adapters.peft.method import merge_command
from lorakit.adapters.peft.targets import (
    BaseNames,
    misread_by_peft,
    misread_note,
    names_in_base,
    refused_by_peft,
    refused_note,
)
from lorakit.adapters.peft.write import save_adapter
from lorakit.errors import AdapterError
from lorakit.models.hub import load_config
from lorakit.models.kinds import task_type_of
from lorakit.models.window import embedding_rows
from lorakit.notes import Say
from lorakit.training.record import RunRecord
from lorakit.training.setup import Prepared


def export_adapter(prepared: Prepared, directory: Path, record: RunRecord, say: Say) -> None:
    """Save the model's adapter with its tokenizer and a model card; ``say`` gets a line if PEFT
    cannot load it."""
    recipe = prepared.recipe
    hardware = record.hardware
    save_adapter(
        directory,
        prepared.model,
        recipe.adapter,
        method=prepared.method,
        base_model_name_or_path=recipe.model.name_or_path,
        revision=recipe.model.revision,
        names=_names(prepared, directory, say),
        task_type=task_type_of(prepared.task.kind, prepared.task.problem(recipe.task)),
        modules_to_save=prepared.report.modules_to_save,
        tokenizer=prepared.tokenizer,
        card=CardFacts(
            base_model=recipe.model.name_or_path,
            method=recipe.adapter.method,
            task=recipe.task.name,
            data_rows=prepared.data["train"]["rows"],
            metrics=record.metrics,
            steps=record.steps,
            best_step=record.best_step,
            seconds=record.seconds,
            diverged=record.diverged,
            hardware=hardware.get("gpu") or hardware["cpu"],
        ),
        lorakit_info=_task_info(prepared),
        replaces_head=recipe.model.new_head,
    )
    method = prepared.method
    merge = merge_command(recipe.model.name_or_path, directory, method.name)
    merging = f"{merge} writes a plain model"
    if not method.peft_loads:
        say(f"{directory}: PEFT cannot load adapters of {method.name}; lorakit can, and {merging}")
    elif refused := refused_by_peft(prepared.model, _adapted(record)):
        say(f"{directory}: {refused_note(refused)}, and {merging}")
    elif method.peft_type == "LORA" and (
        wrong := misread_by_peft(prepared.model, _adapted(record))
    ):
        say(f"{directory}: {misread_note(wrong)}, and {merging}")


def _task_info(prepared: Prepared) -> dict[str, Any]:
    """What ``lorakit.json`` says about the task, for evaluation, prediction and chats."""
    task, config = prepared.task, prepared.recipe.task
    info: dict[str, Any] = {"task": config.name}
    model = prepared.recipe.model
    if model.add_tokens or model.chat_template is not None:
        info["vocab_size"] = embedding_rows(prepared.model)
    if task.kind == "causal":
        prompts = prepared.system_prompts
        return info | ({"system_prompts": prompts} if prompts else {})
    info["max_length"] = config.max_length
    if labels := task.labels(config, None):
        info["labels"] = labels
    if columns := task.text_columns(config):
        info["text_columns"] = list(columns)
    return info


def _adapted(record: RunRecord) -> list[str]:
    return [module["name"] for module in record.adapted_modules]


def _names(prepared: Prepared, directory: Path, say: Say) -> BaseNames | None:
    """Return the names that the base's original class uses, if another class was trained."""
    if prepared.task.kind != "causal":
        return None
    name = type(prepared.model).__name__
    try:
        names = names_in_base(prepared.model, load_config(prepared.recipe.model))
    except AdapterError as error:
        say(f"{directory}: module names are those of {name}: load that class in PEFT ({error})")
        return None
    if names is not None:
        say(
            f"{directory}: trained as {name}; module names are those of the base's original class, "
            f"{type(names.own).__name__}: load that class in PEFT"
        )
    return names
