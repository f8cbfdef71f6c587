"""The sections of a first recipe, and the comments that say why a value was chosen."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit import registry
from lorakit.first_recipe.choose import Choice
from lorakit.first_recipe.data import Data
from lorakit.first_recipe.model import BaseModel
from lorakit.first_recipe.settings import (
    LARGE,
    SMALL,
    Batches,
    Hardware,
    Lengths,
    batches,
    held_out_share,
    learning_rate,
    max_length,
    quantizes,
)
from lorakit.first_recipe.text import SCHEMA, Sections, commented
from lorakit.tasks.base import GenerationSection

#: Evaluations that generate text for more rows than this take long on a CPU.
_GENERATED_ROWS = 200
_LOW_RANK = ("lora", "lora_plus", "dora", "moslora")


@dataclass(frozen=True)
class Facts:
    """What the recipe follows from. ``lengths`` are None before the rows are tokenized, and
    without data; ``new_head``: the model has a head for other labels."""

    base: BaseModel
    data: Data | None
    choice: Choice
    method: str
    hardware: Hardware
    output: Path
    given: Mapping[str, Mapping[str, Any]]
    lengths: Lengths | None = None
    new_head: bool = False

    @property
    def kind(self) -> str:
        return str(registry.task(self.choice.task).kind)

    @property
    def parameters(self) -> float:
        """Those of the model, or what is usual if they are not known."""
        return self.base.parameters or (LARGE if self.kind == "causal" else SMALL)

    @property
    def is_large(self) -> bool:
        return self.parameters >= LARGE / 2


class _Section:
    """The keys of a section, in order, and their comments."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}
        self.comments: dict[str, str] = {}

    def set(self, key: str, value: Any, comment: str = "") -> None:
        self.keys[key] = value
        if comment:
            self.comments[key] = comment


def recipe_text(facts: Facts) -> str:
    """The recipe as YAML with comments; the keys in ``facts.given`` have the values given there."""
    sizes = _batches(facts)
    built = {
        "model": _model(facts),
        "adapter": _adapter(facts),
        "task": _task(facts),
        "train": _train(facts, sizes),
    }
    for name, keys in facts.given.items():
        section = built.setdefault(name, _Section())
        _replace_given(section, keys)
    sections: Sections = {name: (part.keys, part.comments) for name, part in built.items()}
    return commented(sections, _introduction(facts))


def _replace_given(section: _Section, keys: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        section.set(key, value)
        section.comments.pop(key, None)
    excluded = {"max_steps": "epochs", "warmup_steps": "warmup_ratio"}
    for key, other in excluded.items():
        if key in keys and other not in keys:
            section.keys.pop(other, None)
    if keys.get("per_device_batch_size", "auto") != "auto" and "rows_per_step" not in keys:
        section.keys.pop("rows_per_step", None)


def _introduction(facts: Facts) -> list[str]:
    lines = []
    if facts.data is not None:
        reason = f", {facts.choice.reason}" if facts.choice.reason else ""
        lines.append(f"{facts.data.described()}{reason}.")
    name = shlex.quote(str(facts.output))
    commands = {
        f"lorakit preview {name}": "show rows as the model sees them",
        f"lorakit train {name}": "train the adapter",
        f"lorakit eval {name}": "score it on the validation rows",
        f"lorakit schema > {SCHEMA}": "write the schema, for completion in an editor",
    }
    width = max(map(len, commands))
    return [*lines, *(f"  {command:<{width}}  # {what}" for command, what in commands.items())]


def _model(facts: Facts) -> _Section:
    section, base = _Section(), facts.base
    section.set("name_or_path", base.name)
    if facts.hardware.kind == "gpu":
        section.set("dtype", "bfloat16")
    elif facts.kind == "encoder" and not facts.is_large:
        section.set(
            "dtype", "float32", "A small model has room for float32, which is more precise."
        )
    else:
        section.set("dtype", "bfloat16", "Half the memory of float32.")
    if quantizes(facts.method, base.parameters, facts.hardware):
        size = f"{(base.parameters or 0) / 1e9:.1f} billion parameters in bfloat16"
        section.set("base_precision", "nf4", f"4 bits a weight (QLoRA): {size} would not fit.")
    if facts.new_head:
        section.set("new_head", True, "The model's own head is for other labels.")
    if facts.choice.task == "chat" and base.has_chat_template is False:
        vocabulary = base.tokenizer.get_vocab() if base.tokenizer else {}
        name = "chatml" if "<|im_start|>" in vocabulary else "vicuna"
        section.set("chat_template", name, "The tokenizer has none of its own.")
    return section


def _adapter(facts: Facts) -> _Section:
    section = _Section()
    section.set("method", facts.method, "lorakit methods lists the others.")
    targets = "all-linear: every linear layer of the transformer; [q, v] trains fewer parameters."
    if facts.method in _LOW_RANK:
        section.set("r", 16, "The rank: a higher one trains more parameters.")
        section.set("lora_alpha", 32, "The update is scaled by lora_alpha / r.")
        section.set("target_modules", ["all-linear"], targets)
    elif facts.method == "adalora":
        section.set("target_r", 8, "The average rank in the end; training starts at init_r.")
        section.set("init_r", 12)
        section.set("lora_alpha", 24, "The update is scaled by lora_alpha / init_r.")
        section.set("orth_reg_form", "mean_norm", "As in the authors' code.")
        section.set("target_modules", ["all-linear"], targets)
    return section


def _task(facts: Facts) -> _Section:
    section, data, lengths = _Section(), facts.data, facts.lengths
    section.set("name", facts.choice.task, "lorakit tasks lists the others.")
    if data is not None:
        section.set("path", data.path)
    for key, value in facts.choice.keys.items():
        section.set(key, value)
    comment = ""
    if lengths is not None:
        how = "an estimate, as the tokenizer is not on this machine" if lengths.is_estimate else (
            f"measured on {len(lengths.tokens):,}"
        )  # fmt: skip
        middle, longest = lengths.quantile(0.5), lengths.tokens[-1]
        comment = f"Tokens of a row: {middle} (median), {longest} (longest; {how})."
    limit = max_length(lengths, facts.hardware, facts.base.positions)
    if lengths is not None and (cut := sum(n > limit for n in lengths.tokens)):
        share = cut / len(lengths.tokens)
        comment += f" {max(share, 0.001):.1%} are longer than max_length and are truncated."
    section.set("max_length", limit, comment)
    _hold_out(section, facts)
    return section


def _hold_out(section: _Section, facts: Facts) -> None:
    """Rows for validation, and for evaluations that generate text not too many of them."""
    data = facts.data
    if data is None:
        return
    rows, held = data.rows or 10**6, data.validation_rows
    if not held and (share := held_out_share(rows)):
        comment = (
            "There is no validation split: this share of the training rows is held out for it."
        )
        section.set("validation_share", share, comment)
        held = int(share * rows)
    config = registry.task(facts.choice.task).Config
    generates = issubclass(config, GenerationSection) and facts.choice.task != "chat"
    if generates and held > _GENERATED_ROWS and facts.hardware.kind == "cpu":
        comment = "Answers are generated in the final evaluation, which is slow on a CPU."
        section.set("limit_eval", _GENERATED_ROWS, comment)


def _batches(facts: Facts) -> Batches:
    limit = max_length(facts.lengths, facts.hardware, facts.base.positions)
    rows = facts.data.rows if facts.data is not None else None
    share = 0 if facts.data is None or facts.data.validation_rows else held_out_share(rows or 0)
    rows = None if rows is None else max(1, round(rows * (1 - (share or 0))))
    return batches(facts.hardware, facts.kind, facts.lengths, limit, rows)


def _train(facts: Facts, sizes: Batches) -> _Section:
    section = _Section()
    section.set("output_dir", _free_directory(_stem(facts)))
    section.set("epochs", sizes.epochs)
    if sizes.rows == "auto":
        section.set("per_device_batch_size", "auto", "The largest that fits on the GPU.")
        section.set("rows_per_step", sizes.rows_per_step)
    else:
        section.set("per_device_batch_size", sizes.rows)
        if sizes.accumulation > 1:
            section.set("gradient_accumulation_steps", sizes.accumulation,
                        f"{sizes.rows_per_step} rows per step.")  # fmt: skip
    _set_learning_rate(section, facts)
    section.set("lr_scheduler", "linear" if facts.kind == "encoder" else "cosine")
    section.set("warmup_ratio", 0.06)
    if facts.is_large:
        comment = (
            "Saves memory for about a third more time: layers are recomputed in the backward pass."
        )
        section.set("gradient_checkpointing", True, comment)
    return section


def _set_learning_rate(section: _Section, facts: Facts) -> None:
    config = registry.method(facts.method).Config
    rate = learning_rate(config.usual_learning_rates, facts.parameters)
    if rate is None:
        section.set("learning_rate", 2e-4, "The method has no usual rate: try others.")
        return
    note = f"; {config.learning_rate_note}" if config.learning_rate_note else ""
    comment = (
        f"Usual for {facts.method}: {config.shown_learning_rates()}, from models of billions of "
        f"parameters to small ones{note}."
    )
    section.set("learning_rate", rate, comment)


def _stem(facts: Facts) -> str:
    """A name for the run: that of the recipe's file, or of the data."""
    if facts.output.stem != "recipe":
        return facts.output.stem
    if facts.data is None:
        return facts.choice.task.replace("/", "-")
    first = facts.data.train.files[0][0]
    is_folder = isinstance(facts.data.path, str) and Path(facts.data.path).is_dir()
    name = Path(facts.data.path).resolve().name if is_folder else first.name.split(".")[0]
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name) or "run"


def _free_directory(stem: str) -> str:
    """``runs/STEM``, or ``runs/STEM-2`` and so on if that exists."""
    name, number = f"runs/{stem}", 2
    while Path(name).exists():
        name, number = f"runs/{stem}-{number}", number + 1
    return name
