"""The model card of an adapter: what it is, how it was trained and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorakit.user_code import is_code
from lorakit.version import __version__


@dataclass(frozen=True)
class CardFacts:
    """The contents of the card; empty values are omitted. ``seconds`` is the training time,
    ``peft_loads`` whether PEFT supports the method, ``base_class`` the class to load the base with
    if it is not that of AutoModelForCausalLM."""

    base_model: str
    method: str
    r: int | None = None
    lora_alpha: float | None = None
    target_modules: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    task: str | None = None
    task_type: str = "CAUSAL_LM"
    num_labels: int | None = None
    data_rows: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    hardware: str | None = None
    diverged: bool = False
    peft_loads: bool = True
    base_class: str | None = None
    misread: Sequence[str] = ()
    refused: Sequence[str] = ()


def model_card(facts: CardFacts) -> str:
    """Return the text of ``README.md``, with the Hub's front matter."""
    title = f"# {facts.method} adapter of {facts.base_model}"
    sections = [_front_matter(facts), title]
    if facts.diverged:
        sections.append(
            "**The training diverged**: the loss ended far above its initial value. Check the "
            "metrics before using this adapter; a lower learning rate is likely to help."
        )
    sections.append(_table(facts))
    if facts.metrics:
        rows = [f"| {name} | {value:.4g} |" for name, value in facts.metrics.items()]
        sections.append("\n".join(["## Metrics", "", "| metric | value |", "|---|---|", *rows]))
    sections.append(_usage(facts))
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts) -> str:
    classifies = facts.task_type == "SEQ_CLS"
    lines = [
        "---",
        f"base_model: {json.dumps(facts.base_model, ensure_ascii=False)}",
        f"library_name: {'peft' if facts.peft_loads else 'lorakit'}",
        f"pipeline_tag: {'text-classification' if classifies else 'text-generation'}",
        "tags:",
        *(["- lora"] if facts.peft_loads else []),
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
        "fully trained": ", ".join(facts.modules_to_save),
        "task": facts.task,
        "training rows": f"{facts.data_rows:,}" if facts.data_rows is not None else None,
        "optimizer steps": f"{facts.steps:,}" if facts.steps is not None else None,
        "training time": f"{facts.seconds:.0f} s" if facts.seconds is not None else None,
        "hardware": facts.hardware,
        "written by": f"lorakit {__version__}",
    }
    rows = [f"| {name} | {value} |" for name, value in values.items() if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *rows])


def _usage(facts: CardFacts) -> str:
    base = json.dumps(facts.base_model, ensure_ascii=False)
    other = _with_peft(facts, base) if facts.peft_loads else _by_merging(facts, base)
    if facts.peft_loads and facts.misread:
        other = _misread(facts, base)
    if facts.peft_loads and facts.refused:
        other = _refused(facts, base)
    method = f", method={json.dumps(facts.method)}" if is_code(facts.method) else ""
    return f"""## Use

{other}

With lorakit:

```python
import lorakit

model = lorakit.load({base}, "path/to/this/directory"{method})
```"""


def _by_merging(facts: CardFacts, base: str) -> str:
    return f"PEFT does not support this method. {_merged(facts, base)}"


def _misread(facts: CardFacts, base: str) -> str:
    return (
        f"PEFT 0.19 to 0.21 with transformers 5 mistakes {', '.join(facts.misread)} for experts, "
        f"and applies this adapter to the wrong modules. {_merged(facts, base)}"
    )


def _refused(facts: CardFacts, base: str) -> str:
    return (
        f"PEFT 0.16 and later do not load an adapter of {' and '.join(facts.refused)} for models "
        f"with Mamba layers. {_merged(facts, base)}"
    )


def _merged(facts: CardFacts, base: str) -> str:
    option = f" --method {facts.method}" if is_code(facts.method) else ""
    return f"""Merge it into a model that plain transformers loads:

```bash
lorakit merge {base} path/to/this/directory merged{option}
```"""


def _with_peft(facts: CardFacts, base: str) -> str:
    auto = facts.base_class or "AutoModelForCausalLM"
    options = ""
    if facts.task_type == "SEQ_CLS":
        auto = "AutoModelForSequenceClassification"
        options = f", num_labels={facts.num_labels or 'N'}"
    return f"""With PEFT:

```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({base}{options})
model = PeftModel.from_pretrained(base, "path/to/this/directory")
```"""
