"""Axolotl's YAML files, with the defaults of its schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.migration import common
from lorakit.migration.axolotl_data import set_task
from lorakit.migration.draft import Draft, refuse
from lorakit.recipe.peers.axolotl import AXOLOTL

_PREFERENCES = "lorakit trains on examples, not on preferences or rewards"
_DEFAULT_WARMUP_RATIO = 0.03


def draft_axolotl(given: Mapping[str, Any]) -> Draft:
    """Fill a draft from a file. Raises UserError for a kind of training that lorakit lacks."""
    draft = Draft(given, AXOLOTL)
    for key in ("rl", "reward_model", "process_reward_model"):
        if value := draft.take(key):
            raise refuse(key, value, _PREFERENCES)
    set_task(draft)
    _method(draft)
    common.chat_template(draft, "chat_template", _named_template(draft))
    common.template_file(draft, "chat_template_jinja")
    common.length_of_run(draft, "num_epochs", 1.0)
    common.warmup(draft, _DEFAULT_WARMUP_RATIO)
    common.intervals(draft, ("eval_steps", "save_steps"))
    common.strategies(draft)
    common.share_of_validation(draft, "val_set_size")
    _tokens(draft)
    _tracking(draft)
    draft.translate_rest()
    for key, value in (
        ("task.max_length", 512),
        ("train.output_dir", "./model-out"),
        ("train.per_device_batch_size", 1),
        ("train.lr_scheduler", "cosine"),
        ("adapter.r", 8),
        ("adapter.lora_alpha", 8),
    ):
        draft.default(key, value)
    if "target_modules" not in draft.sections["adapter"] and not draft.get(
        "adapter.target_parameters"
    ):
        draft.default("adapter.target_modules", ["q", "v"])
    common.adapter_method(draft)
    common.batch(draft, "micro_batch_size")
    return draft


def _method(draft: Draft) -> None:
    name = draft.text("adapter")
    if name not in (None, "lora", "qlora"):
        raise refuse(
            "adapter", name, "no method of lorakit corresponds; allowed: lora, qlora, or none"
        )
    draft.set("adapter.method", "full" if name is None else "lora")
    if name == "qlora":
        draft.set("model.base_precision", "nf4")
    eight = draft.take("load_in_8bit")
    if eight and name is not None:
        note = (
            "8-bit integer bases are not supported: the base stays in model.dtype, which takes "
            "twice the memory; nf4 takes less"
        )
        draft.lose("load_in_8bit", eight, note)
    if name is None and draft.given.get("load_in_4bit") is True:
        draft.take("load_in_4bit")
        draft.change("load_in_4bit", True, "full fine-tuning has no quantized base")
    targets = draft.take("lora_target_modules")
    if isinstance(targets, str):
        is_name = targets == "all-linear"
        draft.set("adapter.target_modules", targets if is_name else [f"re:{targets}"])
    elif targets is not None:
        draft.set("adapter.target_modules", targets)
    if draft.take("lora_target_linear"):
        if targets:
            draft.change("lora_target_linear", True, "all linear layers, listed modules included")
        draft.set("adapter.target_modules", ["all-linear"])


def _named_template(draft: Draft) -> str | None:
    name = draft.text("chat_template", "")
    return None if name == "jinja" or str(name).startswith("tokenizer_default") else name


def _tokens(draft: Draft) -> None:
    """``special_tokens`` without effect on a recipe: the padding token is masked."""
    special = draft.take("special_tokens")
    if isinstance(special, Mapping):
        for name, token in special.items():
            if name == "pad_token":
                draft.ignored.append("special_tokens.pad_token")
            elif name == "additional_special_tokens" and isinstance(token, list):
                draft.set("model.add_tokens", list(token))
            elif token:
                note = "the special tokens are those of the model's tokenizer"
                draft.lose(f"special_tokens.{name}", token, note)
    if isinstance(draft.given.get("tokens"), Mapping):
        note = "the special tokens are those of the model's tokenizer"
        draft.lose("tokens", draft.take("tokens"), note)
    elif tokens := draft.names("tokens"):
        draft.set("model.add_tokens", [*(draft.get("model.add_tokens") or ()), *tokens])


def _tracking(draft: Draft) -> None:
    found = ["tensorboard"] if draft.take("use_tensorboard") else []
    if project := draft.take("wandb_project"):
        found.append("wandb")
        draft.lose("wandb_project", project, "set WANDB_PROJECT in the environment")
    if found:
        draft.set("train.trackers", found)
