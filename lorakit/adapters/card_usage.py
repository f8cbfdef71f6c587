"""The section "Use" of a model card, whose code runs as it stands where the adapter was trained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.user_code import is_code

#: The class that loads a classifier's base, by PEFT's type of its task.
_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
_TEXTS = ("A text to classify.", "And its second text.")


@dataclass(frozen=True)
class UsageFacts:
    """What the code depends on.

    ``directory`` is the adapter's. ``base_class`` is the class to load the base with if it is not
    that of AutoModelForCausalLM. ``labels`` are a classifier's names by index; ``replaces_head``
    says that the base has a head of another size. ``pairs`` says that it was trained on pairs of
    texts, ``chats`` that a causal model was trained on chats. ``misread`` and ``refused`` are the
    modules with which PEFT fails, ``peft_loads`` whether it supports the method at all.
    ``vocab_size`` is the size of a vocabulary that training may have extended.
    """

    base_model: str
    directory: str
    method: str
    task_type: str
    revision: str | None = None
    labels: Sequence[str] = ()
    problem_type: str | None = None
    replaces_head: bool = False
    pairs: bool = False
    chats: bool = False
    has_tokenizer: bool = False
    peft_loads: bool = True
    base_class: str | None = None
    misread: Sequence[str] = ()
    refused: Sequence[str] = ()
    vocab_size: int | None = None


def usage(facts: UsageFacts) -> str:
    """Return the section, in Markdown."""
    other = _by_merging(facts)
    if facts.peft_loads and not (facts.misread or facts.refused):
        other = f"With PEFT:\n\n```python\n{_peft_code(facts)}\n```"
    return f"""## Use

{other}

With lorakit:

```python
{_lorakit_code(facts)}
```

```bash
{_command(facts)}
```"""


def _by_merging(facts: UsageFacts) -> str:
    reason = "PEFT does not support this method."
    if facts.peft_loads and facts.refused:
        reason = (
            f"PEFT 0.16 and later do not load an adapter of {' and '.join(facts.refused)} for "
            "models with Mamba layers."
        )
    elif facts.peft_loads:
        reason = (
            f"PEFT 0.19 to 0.21 with transformers 5 mistakes {', '.join(facts.misread)} for "
            "experts, and applies this adapter to the wrong modules."
        )
    words = ["lorakit", "merge", facts.base_model, facts.directory, "merged", *_option(facts)]
    return f"""{reason} Merge it into a model that plain transformers loads:

```bash
{shlex.join(words)}
```"""


def _peft_code(facts: UsageFacts) -> str:
    auto = facts.base_class or "AutoModelForCausalLM"
    base, directory = _quoted(facts.base_model), _quoted(facts.directory)
    tokenizer = directory if facts.has_tokenizer else base
    load = f"model = PeftModel.from_pretrained(base, {directory})"
    if (size := facts.vocab_size) is not None:
        load = f"""if base.get_input_embeddings().num_embeddings < {size}:
    base.resize_token_embeddings({size})
{load}"""
    options = [f"revision={_quoted(facts.revision)}"] if facts.revision else []
    if facts.task_type not in _CLASSES:
        return f"""from peft import PeftModel
from transformers import AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained({tokenizer})
base = {auto}.from_pretrained({", ".join([base, *options])})
{load}"""
    auto = _CLASSES[facts.task_type]
    options = [*options, *_label_options(facts), "pad_token_id=tokenizer.pad_token_id"]
    if facts.replaces_head:
        options.append("ignore_mismatched_sizes=True")
    arguments = "".join(f"    {option},\n" for option in [base, *options])
    texts = ", ".join(map(_quoted, _texts(facts)))
    return f"""import torch
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({tokenizer})
base = {auto}.from_pretrained(
{arguments})
{load}.eval()
with torch.no_grad():
    logits = model(**tokenizer({texts}, return_tensors="pt")).logits
{_print_result(facts)}"""


def _label_options(facts: UsageFacts) -> list[str]:
    if facts.problem_type == "regression" and len(facts.labels) == 1:
        return ["num_labels=1"]
    if not facts.labels:
        return ["num_labels=N"]  # unknown
    names = ", ".join(f"{index}: {_quoted(name)}" for index, name in enumerate(facts.labels))
    ids = ", ".join(f"{_quoted(name)}: {index}" for index, name in enumerate(facts.labels))
    options = [f"id2label={{{names}}}", f"label2id={{{ids}}}"]
    if facts.problem_type == "multi_label_classification":
        options.append(f"problem_type={_quoted(facts.problem_type)}")
    return options


def _print_result(facts: UsageFacts) -> str:
    if facts.task_type == "TOKEN_CLS":
        return "print([model.config.id2label[i] for i in logits[0].argmax(-1).tolist()])"
    if facts.problem_type == "regression":
        return "print(logits[0].tolist())"
    if facts.problem_type == "multi_label_classification":
        return "print([model.config.id2label[i] for i, x in enumerate(logits[0]) if x >= 0])"
    return "print(model.config.id2label[logits.argmax().item()])"


def _lorakit_code(facts: UsageFacts) -> str:
    base, directory = _quoted(facts.base_model), _quoted(facts.directory)
    method = f", method={_quoted(facts.method)}" if is_code(facts.method) else ""
    code = f"""import lorakit

model, tokenizer = lorakit.load_with_tokenizer({base}, {directory}{method})"""
    if facts.task_type not in _CLASSES:
        return code
    texts = ", ".join(map(_quoted, _texts(facts)))
    given = f"[({texts})]" if facts.pairs else f"[{texts}]"
    return f"{code}\nprint(lorakit.predict({base}, {given}, {directory}{method}))"


def _command(facts: UsageFacts) -> str:
    if facts.task_type in _CLASSES:
        text, *pair = _texts(facts)
        words = ["predict", facts.directory, "--text", text]
        words += ["--text-pair", pair[0]] if pair else []
    else:
        words = ["generate", facts.directory]
        words += ["--chat"] if facts.chats else ["--prompt", "Once upon a time"]
    return shlex.join(["lorakit", *words, *_option(facts)])


def _texts(facts: UsageFacts) -> Sequence[str]:
    return _TEXTS if facts.pairs else _TEXTS[:1]


def _option(facts: UsageFacts) -> list[str]:
    return ["--method", facts.method] if is_code(facts.method) else []


def _quoted(text: str | None) -> str:
    return json.dumps(text, ensure_ascii=False)
