"""The model card of an adapter: what it is, how it was trained and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorakit.adapters.card_usage import UsageFacts, usage
from lorakit.version import __version__


@dataclass(frozen=True)
class CardFacts:
    """The contents of the card; empty values are omitted. ``seconds`` is the training time."""

    base_model: str
    method: str
    r: int | None = None
    lora_alpha: float | None = None
    target_modules: Sequence[str] = ()
    target_parameters: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    task: str | None = None
    data_rows: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    best_step: int | None = None
    seconds: float | None = None
    hardware: str | None = None
    diverged: bool = False


def model_card(facts: CardFacts, use: UsageFacts) -> str:
    """Return the text of ``README.md``, with the Hub's front matter."""
    title = f"# {facts.method} adapter of {facts.base_model}"
    sections = [_front_matter(facts, use), title]
    if facts.diverged:
        sections.append(
            "**The training diverged**: the loss ended far above its initial value. Check the "
            "metrics before using this adapter; a lower learning rate is likely to help."
        )
    sections.append(_table(facts))
    if facts.metrics:
        rows = [f"| {name} | {value:.4g} |" for name, value in facts.metrics.items()]
        sections.append("\n".join(["## Metrics", "", "| metric | value |", "|---|---|", *rows]))
    sections.append(usage(use))
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts, use: UsageFacts) -> str:
    tags = {"SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}
    lines = [
        "---",
        f"base_model: {json.dumps(facts.base_model, ensure_ascii=False)}",
        f"library_name: {'peft' if use.peft_loads else 'lorakit'}",
        f"pipeline_tag: {tags.get(use.task_type, 'text-generation')}",
        "tags:",
        *(["- lora"] if use.peft_loads else []),
        "- lorakit",
        "---",
    ]
    return "\n".join(lines)


def _table(facts: CardFacts) -> str:
    values = {
        "base model": facts.base_model,
        "method": facts.method,
        "r": facts.r,
        "lora_alpha": facts.lora_alpha,
        "target modules": ", ".join(facts.target_modules),
        "target parameters": ", ".join(facts.target_parameters),
        "fully trained": ", ".join(facts.modules_to_save),
        "task": facts.task,
        "training rows": f"{facts.data_rows:,}" if facts.data_rows is not None else None,
        "optimizer steps": f"{facts.steps:,}" if facts.steps is not None else None,
        "weights of step": f"{facts.best_step:,} (the best evaluation)"
        if facts.best_step
        else None,
        "training time": f"{facts.seconds:.0f} s" if facts.seconds is not None else None,
        "hardware": facts.hardware,
        "written by": f"lorakit {__version__}",
    }
    rows = [f"| {name} | {value} |" for name, value in values.items() if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *rows])
