"""Match the labels of a base's classification head to those of a task, or initialize a new head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from lorakit.data.examples import Problem
from lorakit.errors import ModelError, shown
from lorakit.models.hub import load_config
from lorakit.recipe.sections import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # slow to import, and not needed for a preview

Labels = Sequence[str] | None  # None: a regression, with one output
_MULTI_LABEL = "multi_label_classification"
#: The name that transformers gives to an unnamed class.
_UNNAMED = re.compile(r"label_\d+", re.IGNORECASE)


@dataclass(frozen=True)
class HeadPlan:
    """``labels`` are those of the head, by index; ``fresh`` means that its weights are newly
    initialized; ``note`` is a message for the user."""

    labels: Labels
    fresh: bool = False
    note: str | None = None


def plan_head(
    labels: Labels,
    config: PreTrainedConfig,
    new_head: bool,
    name: str,
    problem: Problem | None = None,
) -> HeadPlan:
    """Decide which labels the stored head of the base ``name`` gets for a task with ``labels``.

    A head that has all of the task's labels (``find_labels``) keeps its labels and their order. A
    head with unnamed classes takes the task's labels, in the task's order. Raises ModelError for
    any other head unless ``new_head`` replaces it.
    """
    head = head_labels(config)
    if new_head:
        replaced = f"model.new_head: replacing the base's head ({_described(head)}) with a new one"
        return HeadPlan(labels, fresh=True, note=replaced)
    if labels is None or len(head) == 1:
        if labels is None and len(head) == 1:
            return HeadPlan(None)
        raise _mismatch(labels, head, name)
    found = find_labels(labels, head)
    in_order = found in (None, [*range(len(head))]) and len(labels) == len(head)
    if not names_classes(head) and in_order:
        return HeadPlan(labels, note=None if [*labels] == head else _order_note(labels, head))
    if found is None:
        raise _mismatch(labels, head, name)
    note = _mapping_note(labels, head, found)
    if config.problem_type == _MULTI_LABEL and problem != _MULTI_LABEL:
        several = "the base's head was trained on multi-label rows; this task has one label per row"
        note = f"{note}; {several}" if note else several
    return HeadPlan(head, note=note)


def find_labels(labels: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The index among the head's ``names`` of each of the task's ``labels``; None unless all are
    found.

    Labels are matched exactly; or else ignoring case and surrounding whitespace, with ``_`` and
    ``-`` equal to spaces; or else, unless a name is a number, integers are indices.
    """
    for form in (str, _folded):
        known, wanted = [form(name) for name in names], [form(label) for label in labels]
        if len({*wanted}) == len(wanted) and all(known.count(label) == 1 for label in wanted):
            return [known.index(label) for label in wanted]
    if all(label.isdecimal() for label in labels) and not any(n.isdecimal() for n in names):
        ids = [int(label) for label in labels]
        if len({*ids}) == len(ids) and max(ids) < len(names):
            return ids
    return None


def names_of_head(section: ModelSection, labels: Sequence[str]) -> list[str] | None:
    """Class names from the base's head, for a task that does not define its own.

    They are in the head's order, with the spelling of ``labels`` for those that occur there. None
    if the base has no head with class names, if ``model.new_head`` replaces it, or if it lacks one
    of ``labels``.
    """
    if section.new_head:
        return None
    try:
        config = load_config(section)
    except ModelError:  # the data's error comes first; loading the model raises this one again
        return None
    names = head_labels(config)
    if not (declares_head(config) and len(names) > 1 and names_classes(names)):
        return None
    found = find_labels(labels, names)
    if found is None:
        return None
    if all(label.isdecimal() for label in labels):  # indices
        return names
    spelled = dict(zip(found, labels, strict=True))
    return [spelled.get(index, name) for index, name in enumerate(names)]


def label_columns(model: PreTrainedModel, labels: Labels) -> list[int] | None:
    """The column of the model's logits for each of the task's labels; None if the logits are in
    the same order, and for a regression."""
    if labels is None:
        return None
    names = head_labels(model.config)
    found = find_labels(labels, names)
    assert found is not None, f"{labels} are not labels of the model: {names}"
    return None if found == [*range(len(names))] else found


def label_options(labels: Labels, problem: Problem | None) -> dict[str, Any]:
    """The configuration of a classification head; None means regression."""
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(labels))
    return {
        "num_labels": len(labels),
        "id2label": names,
        "label2id": {label: index for index, label in names.items()},
        "problem_type": None if of_tokens(problem) else problem or "single_label_classification",
    }


def head_labels(config: PreTrainedConfig) -> list[str]:
    """The names of the head's classes, by index."""
    named: Any = config.id2label or {}
    return [str(named.get(index, f"LABEL_{index}")) for index in range(config.num_labels or 0)]


def names_classes(names: Sequence[str]) -> bool:
    """Whether the head's classes have names, rather than only indices."""
    unnamed = all(map(_UNNAMED.fullmatch, names))
    return not unnamed and [*names] != [str(index) for index in range(len(names))]


def declares_head(config: PreTrainedConfig) -> bool:
    """Whether the base was saved as a classifier, of texts or of tokens."""
    names = config.architectures or ()
    return any("ForSequenceClassification" in n for n in names) or declares_token_head(config)


def declares_token_head(config: PreTrainedConfig) -> bool:
    """Whether the base was saved as a classifier of tokens."""
    return any("ForTokenClassification" in name for name in config.architectures or ())


def of_tokens(problem: Problem | None) -> bool:
    """Whether the labels are those of tokens rather than of texts."""
    return problem == "token_classification"


def reads_first_token(problem: Problem | None) -> bool:
    """Whether a head may read the first token alone, as those of BERT do for whole texts."""
    return problem is not None and not of_tokens(problem)


def classifies_texts_only(config: PreTrainedConfig, problem: Problem | None) -> bool:
    """Whether the base was saved with a head for texts, and the labels are those of tokens."""
    return of_tokens(problem) and declares_head(config) and not declares_token_head(config)


def stores_head(model: PreTrainedModel, info: Mapping[str, Any]) -> bool:
    """Whether the checkpoint has weights for the layer that outputs the labels; ``info`` is the
    loading info of ``from_pretrained``."""
    count = model.config.num_labels
    state = {key: value.shape for key, value in model.state_dict().items() if in_head(model, key)}
    last = {key for key, shape in state.items() if shape[:1] == (count,)}
    return bool(last - set(info["missing_keys"]))


def in_head(model: PreTrainedModel, key: str) -> bool:
    """Whether a parameter belongs to the head, that is, lies outside the base model."""
    return not key.startswith(f"{model.base_model_prefix}.")


def renew_head(model: PreTrainedModel, seed: int) -> tuple[str, ...]:
    """Reinitialize the head with the model's own initialization; return the names of its modules
    that have parameters."""
    torch.manual_seed(seed)
    modules = {name: module for name, module in model.named_modules() if in_head(model, f"{name}.")}
    with_parameters = [name for name in modules if _own_parameters(modules, name)]
    for name in with_parameters:
        for parameter in _own_parameters(modules, name):
            # transformers does not reinitialize a parameter that has this mark.
            if hasattr(parameter, "_is_hf_initialized"):
                del parameter._is_hf_initialized
    with torch.no_grad():
        for module in reversed(modules.values()):  # some classes initialize their submodules
            model._init_weights(module)
    return tuple(with_parameters)


def _own_parameters(modules: Mapping[str, nn.Module], name: str) -> list[nn.Parameter]:
    return [*modules[name].parameters(recurse=False)] if name else []


def _order_note(labels: Sequence[str], head: Sequence[str]) -> str:
    pairs = ", ".join(f"{a} = {b}" for a, b in zip(head[:8], labels[:8], strict=True))
    more = ", ..." if len(head) > 8 else ""
    return f"the base's classification head has unnamed classes; matched in order: {pairs}{more}"


def _mapping_note(labels: Sequence[str], head: Sequence[str], found: Sequence[int]) -> str | None:
    names = [head[index] for index in found]
    unused = [name for index, name in enumerate(head) if index not in found]
    note = None
    if names != [*labels]:
        pairs = [f"{a} = {b}" for a, b in zip(labels[:8], names[:8], strict=True)]
        note = f"labels of the data = labels of the base's head: {', '.join(pairs)}"
        note += ", ..." if len(labels) > 8 else ""
    elif [*found] != [*range(len(head))]:
        note = f"the base's classification head keeps the order of its labels: {_described(head)}"
    if unused:
        extra = f"the task has no label {_described(unused)}; predicting one counts as wrong"
        note = f"{note}; {extra}" if note else f"the base's classification head: {extra}"
    return note


def _mismatch(labels: Labels, head: Sequence[str], name: str) -> ModelError:
    has = f"has {len(head)} labels ({_described(head)})" if len(head) > 1 else "has one output"
    absent = [label for label in labels or () if find_labels([label], head) is None]
    if labels is None:
        wants = "and the task is a regression, which has one output"
    elif not absent:
        wants = _ambiguous(labels)
    elif len(absent) < len(labels):
        wants = f"but not the task's {_described(absent)}"
    else:
        noun = "" if len(head) > 1 else " labels"
        wants = f"and the task has {len(labels)}{noun} ({_described(labels)})"
    return ModelError(
        f"{name}: its classification head {has}, {wants}; allowed: labels that "
        "the head has, or model.new_head: true, which replaces the head with a new one"
    )


def _ambiguous(labels: Sequence[str]) -> str:
    """Explain why labels that the head has individually do not match together."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(_folded(label), []).append(label)
    alike = [label for group in groups.values() if len(group) > 1 for label in group]
    if alike:
        return (
            f"one of which matches several labels of the task: {_described(alike)} (labels that "
            "differ only in case or whitespace are separate classes)"
        )
    return f"and the task's labels mix names and indices of these: {_described(labels)}"


def _described(names: Sequence[str]) -> str:
    listed = [n if n.isprintable() and n == n.strip() else shown(n) for n in names[:10]]
    return ", ".join(listed) + (", ..." if len(names) > 10 else "")


def _folded(name: str) -> str:
    return " ".join(re.sub(r"[_\-]", " ", name).casefold().split())
