"""What the files of all tools need: lengths of runs, warmups, batches, methods and templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorakit.migration.draft import Draft, refuse

#: Names of chat templates elsewhere -> those of ``model.chat_template``.
_TEMPLATES = {
    "alpaca": "alpaca", "chatml": "chatml", "gemma": "gemma", "llama2": "llama-2",
    "llama3": "llama-3", "mistral": "mistral", "mistral_v1": "mistral", "vicuna": "vicuna",
    "zephyr": "zephyr",
}  # fmt: skip
#: The keys of ``adapter`` that full fine-tuning does not have.
_LOW_RANK = ("adapter.r", "adapter.lora_alpha", "adapter.lora_dropout", "adapter.target_modules",
             "adapter.target_parameters", "adapter.use_rslora", "adapter.init",
             "adapter.rank_pattern", "adapter.alpha_pattern", "adapter.modules_to_save",
             "adapter.layers")  # fmt: skip


def chat_template(draft: Draft, key: str, name: str | None) -> None:
    """Set ``model.chat_template`` to the template called ``name`` in another tool."""
    if name in _TEMPLATES:
        draft.set("model.chat_template", _TEMPLATES[name])
    elif name and name not in ("tokenizer_default", "default"):
        draft.change(key, name, "the chat template of the model's tokenizer is used")


def template_file(draft: Draft, key: str) -> None:
    """Set ``model.chat_template`` to the file that ``key`` names; a template in the file itself has
    to be saved by the user."""
    name = draft.text(key)
    if name and len(name) < 1024 and "\n" not in name and Path(name).is_file():
        draft.set("model.chat_template", name)
    elif name:
        note = "save the template in a file, and name it in model.chat_template"
        draft.lose(key, name, note)


def length_of_run(draft: Draft, epochs_key: str, default_epochs: float) -> None:
    """``max_steps`` takes precedence over epochs, as in Trainer."""
    steps, epochs = draft.number("max_steps"), draft.number(epochs_key)
    if steps is not None and steps > 0:
        draft.set("train.max_steps", steps)
        if epochs is not None:
            draft.change(epochs_key, epochs, "not used, because max_steps is set")
    else:
        draft.set("train.epochs", default_epochs if epochs is None else epochs)


def warmup(draft: Draft, default_ratio: float) -> None:
    """``warmup_steps`` takes precedence over the ratio; below 1 it is a ratio itself."""
    steps, ratio = draft.number("warmup_steps"), draft.number("warmup_ratio")
    if steps is not None and 0 < steps < 1:
        draft.set("train.warmup_ratio", float(steps))
    elif steps:
        draft.set("train.warmup_steps", steps)
    else:
        draft.set("train.warmup_ratio", float(default_ratio if ratio is None else ratio))


def intervals(draft: Draft, keys: Sequence[str]) -> None:
    """Report intervals that are a share of the run; a recipe has numbers of steps."""
    for key in keys:
        value = draft.given.get(key)
        if isinstance(value, float) and 0 < value < 1:
            draft.take(key)
            draft.lose(key, value, "a share of the run; a recipe has a number of steps")


def strategies(draft: Draft) -> None:
    """``steps`` needs nothing but the number of steps; ``no`` has no counterpart."""
    for key, what in (("eval_strategy", "evaluation"), ("evaluation_strategy", "evaluation"),
                      ("save_strategy", "checkpoint")):  # fmt: skip
        value = draft.take(key)
        if value in ("no", False):
            draft.lose(key, value, f"there is one {what} per epoch, unless a step count is set")
        elif value == "best":
            draft.lose(key, value, "the adapter is always that of the best evaluation")


def trackers(draft: Draft) -> None:
    """Set ``train.trackers`` from the name or the names in ``report_to``."""
    names = draft.names("report_to")
    known = [name for name in ("tensorboard", "wandb") if name in names or "all" in names]
    if known:
        draft.set("train.trackers", known)
    for name in names:
        if name not in ("tensorboard", "wandb", "all", "none"):
            draft.lose("report_to", name, "lorakit has tensorboard and wandb")


def adapter_method(draft: Draft) -> None:
    """Choose the method by the keys that only one has: LoRA+ by its ratio; full fine-tuning has no
    ranks."""
    if draft.get("adapter.method") == "full":
        dropped = [key for key in _LOW_RANK if draft.get(key) is not None]
        draft.drop(*_LOW_RANK, "adapter.loraplus_lr_ratio", "adapter.loraplus_lr_embedding")
        if dropped:
            names = ", ".join(key.partition(".")[2] for key in dropped)
            draft.changed.append(f"{names}: not used, because all parameters are trained")
        if (stored := draft.get("model.base_precision")) is not None:
            raise refuse("model.base_precision", stored, "not supported with adapter.method = full")
        return
    if draft.get("adapter.loraplus_lr_ratio") is not None:
        draft.set("adapter.method", "lora_plus")
    else:
        draft.drop("adapter.loraplus_lr_embedding")
    targets = draft.get("adapter.target_modules")
    if targets == [] and draft.get("adapter.target_parameters"):
        draft.drop("adapter.target_modules")


def share_of_validation(draft: Draft, key: str) -> None:
    value = draft.number(key)
    if value is not None and 0 < value < 1:
        draft.set("task.validation_share", float(value))
    elif value:
        draft.lose(key, value, "a number of rows; task.validation_share is a share of them")


def batch(draft: Draft, rows_key: str) -> None:
    """Say how many rows a step has."""
    rows = draft.get("train.per_device_batch_size")
    steps = draft.get("train.gradient_accumulation_steps") or 1
    if not (isinstance(rows, int) and isinstance(steps, int)):
        return
    what = (
        f"packed bins of {draft.get('task.max_length')} tokens"
        if draft.get("task.packing")
        else "rows"
    )
    draft.changed.append(
        f"batch: {rows} x {steps} = {rows * steps} {what} per step and process ({rows_key} x "
        "gradient_accumulation_steps); the loss is the mean over the trained tokens of the step"
    )
