"""LLaMA-Factory's YAML files, with the defaults of its arguments and of Trainer's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.migration import common
from lorakit.migration.draft import Draft, refuse
from lorakit.migration.llama_factory_data import set_task
from lorakit.recipe.peers.counterpart import Counterpart, missing, needless
from lorakit.recipe.peers.llama_factory import LLAMA_FACTORY
from lorakit.recipe.peers.trainer import LAUNCH

_METHODS = {"lora": "lora", "full": "full"}
#: Keys of the files of version 1, besides those with the names of the older ones.
_VERSION_1: dict[str, Counterpart] = {
    "model": LLAMA_FACTORY["model_name_or_path"],
    "micro_batch_size": LLAMA_FACTORY["per_device_train_batch_size"],
    "dist_config": missing(LAUNCH),
    "optim_config": missing("train.optimizer is adamw, adamw_8bit or sgd"),
    "batching_strategy": missing("task.packing, train.group_by_length, train.max_tokens_per_batch"),
    "cp_size": missing(LAUNCH),
    **dict.fromkeys(
        ("model_class", "kernel_config", "init_config", "sample_backend", "max_new_tokens"),
        needless("lorakit decides"),
    ),
}


def draft_llama_factory(given: Mapping[str, Any], file: Path) -> Draft:
    """Fill a draft from the data of ``file``. Raises UserError for a kind of training that lorakit
    lacks."""
    draft = Draft(_flat(given), {**LLAMA_FACTORY, **_VERSION_1})
    stage = draft.text("stage", "sft")
    if stage not in ("sft", "pt"):
        note = "lorakit trains on examples, not on preferences or rewards; allowed: sft, pt"
        raise refuse("stage", stage, note)
    set_task(draft, stage, file)
    _method(draft)
    common.chat_template(draft, "template", draft.text("template"))
    common.length_of_run(draft, "num_train_epochs", 3.0)
    common.warmup(draft, 0.0)
    common.intervals(draft, ("eval_steps", "save_steps", "logging_steps"))
    common.strategies(draft)
    common.share_of_validation(draft, "val_size")
    common.trackers(draft)
    _tokens(draft)
    draft.set("train.gradient_checkpointing", not draft.take("disable_gradient_checkpointing"))
    draft.translate_rest()
    for key, value in (
        ("task.max_length", 2048),
        ("train.per_device_batch_size", 8),
        ("train.learning_rate", 5e-5),
        ("train.lr_scheduler", "linear"),
        ("adapter.r", 8),
        ("adapter.target_modules", ["all-linear"]),
    ):
        draft.default(key, value)
    r = draft.get("adapter.r")
    draft.default("adapter.lora_alpha", 2 * r if isinstance(r, int) else 16)
    common.adapter_method(draft)
    common.batch(draft, "per_device_train_batch_size")
    return draft


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of version 1, whose settings of the adapter and of quantization are mappings, under
    the names of the older files."""
    flat = dict(given)
    adapter = flat.pop("peft_config", None)
    if isinstance(adapter, Mapping):
        names = {"name": "finetuning_type", "r": "lora_rank", "target_modules": "lora_target"}
        flat |= {names.get(str(key), str(key)): value for key, value in adapter.items()}
    elif "train_dataset" in flat:
        flat["finetuning_type"] = "full"
    quantization = flat.pop("quant_config", None)
    if isinstance(quantization, Mapping):
        flat["quantization_bit"] = quantization.get("quantization_bit")
    return flat


def _method(draft: Draft) -> None:
    kind = draft.text("finetuning_type", "lora")
    if kind is None or kind not in _METHODS:
        raise refuse(
            "finetuning_type", kind, "no method of lorakit corresponds; allowed: lora, full"
        )
    draft.set("adapter.method", _METHODS[kind])
    if draft.take("use_dora"):
        draft.set("adapter.method", "dora")
    if targets := draft.names("lora_target"):
        draft.set("adapter.target_modules", ["all-linear"] if targets == ["all"] else targets)
    if extra := draft.names("additional_target"):
        draft.set("adapter.modules_to_save", extra)
    adapters = draft.names("adapter_name_or_path")
    if adapters:
        draft.set("adapter.init_from", adapters[-1])
    if len(adapters) > 1:
        draft.lose("adapter_name_or_path", adapters, "merge the first ones into the base before")


def _tokens(draft: Draft) -> None:
    tokens = [*draft.names("add_tokens"), *draft.names("add_special_tokens")]
    if tokens:
        draft.set("model.add_tokens", tokens)
