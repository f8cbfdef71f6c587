"""Load a model and its tokenizer from a directory or the Hub, and inspect the loaded model.

Weights are read from safetensors only.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorakit.data.examples import Problem
from lorakit.errors import ModelError
from lorakit.host.resources import host_memory
from lorakit.models.dequantized import dequantization_notes, from_pretrained
from lorakit.models.heads import (
    classifies_texts_only,
    declares_head,
    in_head,
    label_options,
    plan_head,
    renew_head,
    stores_head,
)
from lorakit.models.hub import (
    WRONG_CONFIG,
    explained,
    hub_options,
    load_config,
    load_tokenizer,
    quiet,
)
from lorakit.models.kinds import (
    Kind,
    TaskType,
    check_kind,
    loader,
    stored_task_type,
    task_type_of,
)
from lorakit.models.vocabulary import extend_vocabulary
from lorakit.recipe.check import has_accelerator
from lorakit.recipe.sections import ModelSection

#: How transformers words that a model or the machine does not support an attention implementation.
_NO_ATTENTION = re.compile(r"flash ?attention|attention implementation", re.IGNORECASE)


@dataclass(frozen=True)
class Pretrained:
    """A loaded model. ``new_modules`` have no weights in the checkpoint (a new classification
    head); ``trained_tokens`` are the ids whose rows of the embedding are to be trained; ``notes``
    are messages for the user."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_modules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    trained_tokens: tuple[int, ...] = ()


def load_pretrained(
    section: ModelSection,
    kind: Kind,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    *,
    head_given: bool = False,
    problem: Problem | None = None,
) -> Pretrained:
    """Load the model, in evaluation mode and ``section.dtype``, and its tokenizer.

    ``labels`` are an encoder's class names, None for regression; without ``problem``, each row has
    one of them. ``plan_head`` decides how a head in the checkpoint is used; a missing one is
    initialized from ``seed``. With ``head_given``, an adapter provides the head, with ``labels``,
    and the base's is ignored. Tokens that ``section`` adds extend both. Raises ModelError if the
    model is missing, gated, unreachable, of the other kind or not in safetensors, if its head does
    not fit, or if weights other than a head's are missing.
    """
    name = section.name_or_path
    hub = hub_options(section)
    config = load_config(section)
    check_kind(config, kind, name)
    options: dict[str, Any] = {**hub, "dtype": getattr(torch, section.dtype)}
    if section.attn_implementation != "auto":
        options["attn_implementation"] = section.attn_implementation
    tokenizer, notes = load_tokenizer(name, hub)
    notes += dequantization_notes(section, config)
    if kind == "causal":
        model, info = _from_pretrained(loader("CAUSAL_LM"), name, config, options, seed)
        check_shapes(info["mismatched_keys"], name)
    elif head_given:
        model, info = _classifier(name, config, labels, problem, options, seed)
    else:
        model, info, note = _with_head(section, config, labels, problem, options, seed)
        notes += [note] if note else []
    vocabulary = extend_vocabulary(model, tokenizer, section)
    model.config.pad_token_id = tokenizer.pad_token_id
    new = _new_modules(model, info, kind, name)
    notes += vocabulary.notes
    return Pretrained(model.eval(), tokenizer, new, tuple(notes), vocabulary.trained)


def load_model(section: ModelSection, dtype: str | None) -> PreTrainedModel:
    """Load a checkpoint as the classifier or causal model that it was saved as, in evaluation mode.

    ``dtype`` None is that of the checkpoint. Raises ModelError if it is neither, or incomplete.
    """
    name = section.name_or_path
    config = load_config(section)
    task_type = stored_task_type(config)
    if task_type == "CAUSAL_LM":
        check_kind(config, "causal", name)
    options = {**hub_options(section), "dtype": getattr(torch, dtype) if dtype else "auto"}
    model, info = _from_pretrained(loader(task_type), name, config, options, seed=0)
    check_shapes(info["mismatched_keys"], name)
    _check_complete(model, info["missing_keys"], name)
    model.eval()
    return model


def _with_head(
    section: ModelSection,
    config: PreTrainedConfig,
    labels: Sequence[str] | None,
    problem: Problem | None,
    options: Mapping[str, Any],
    seed: int,
) -> tuple[PreTrainedModel, dict[str, Any], str | None]:
    """Return the classifier with the checkpoint's head or a new one, its loading info and a
    note."""
    name = section.name_or_path
    plan, mismatch = None, None
    if classifies_texts_only(config, problem):
        model, info = _classifier(name, config, labels, problem, options, seed)
        info["missing_keys"] |= {f"{module}." for module in renew_head(model, seed)}
        return model, info, "the base's head for texts is replaced with a new one for tokens"
    try:
        plan = plan_head(labels, config, section.new_head, name, problem)
    except ModelError as error:  # raised below, if the checkpoint has a head at all
        mismatch = error
    expected = plan.labels if plan is not None and declares_head(config) else labels
    model, info = _classifier(name, config, expected, problem, options, seed)
    if not stores_head(model, info):
        if expected != labels:
            model, info = _classifier(name, config, labels, problem, options, seed)
        return model, info, None
    if mismatch is not None:
        raise mismatch
    assert plan is not None, "there is a plan or a mismatch"
    if expected != plan.labels:
        model, info = _classifier(name, config, plan.labels, problem, options, seed)
    if plan.fresh:
        info["missing_keys"] |= {f"{module}." for module in renew_head(model, seed)}
    return model, info, plan.note


def _classifier(
    name: str,
    config: PreTrainedConfig,
    labels: Sequence[str] | None,
    problem: Problem | None,
    options: Mapping[str, Any],
    seed: int,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the base with a head for ``labels``; head tensors of another shape are newly
    initialized."""
    config = copy.deepcopy(config)
    for key, value in label_options(labels, problem).items():
        setattr(config, key, value)
    auto = loader(task_type_of("encoder", problem))
    model, info = _from_pretrained(auto, name, config, options, seed)
    check_shapes([key for key in info["mismatched_keys"] if not in_head(model, key[0])], name)
    return model, info


def _from_pretrained(
    auto: Any, name: str, config: PreTrainedConfig, options: Mapping[str, Any], seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    torch.manual_seed(seed)
    with explained(name, "cannot be loaded"), _explained_attention(name, options), quiet():
        model, info = from_pretrained(auto, name, config, options)
    return model, {**info, "missing_keys": {*info["missing_keys"]}}


@contextmanager
def _explained_attention(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn transformers' error about the chosen attention into one that names the recipe's key."""
    chosen = options.get("attn_implementation")
    try:
        yield
    except (ImportError, ValueError) as error:
        if chosen is None or not _NO_ATTENTION.search(str(error)):
            raise
        reason = str(error).strip().partition(". ")[0].rstrip(".")
        raise ModelError(
            f'model.attn_implementation = "{chosen}": {name}: {reason}; hint: auto chooses one '
            "that the model supports"
        ) from error


def _new_modules(model: PreTrainedModel, info: Any, kind: Kind, name: str) -> tuple[str, ...]:
    missing = sorted(info["missing_keys"])
    base = [key for key in missing if kind == "causal" or _is_backbone(model, key)]
    _check_complete(model, base, name)
    modules = {key.rpartition(".")[0] for key in missing}
    return tuple(sorted(module for module in modules if module))


def _check_complete(model: PreTrainedModel, missing: Collection[str], name: str) -> None:
    if missing:
        raise ModelError(
            f"{name}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, "
            f"including {min(missing)}"
        )


def _is_backbone(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight belongs to the pretrained part; a pooler may be new, like a head."""
    return key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key


def check_shapes(mismatched: Iterable[Any], name: str) -> None:
    """Raise ModelError for the first of transformers' (tensor, stored shape, model's shape)."""
    for tensor, stored, expected in sorted(mismatched, key=lambda entry: str(entry[0])):
        raise ModelError(
            f"{name}: {tensor} has shape {tuple(stored)}, but the configuration says "
            f"{tuple(expected)}"
        )


def default_device() -> torch.device:
    """The machine's accelerator (CUDA, ROCm or Apple), else the CPU. As in training,
    ``ACCELERATE_USE_CPU`` and an empty ``CUDA_VISIBLE_DEVICES`` hide it."""
    if has_accelerator():
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
    return torch.device("cpu")


def device_memory_bytes(device: torch.device) -> int:
    """All memory of ``device``: of an Apple GPU what it can use of the host's, of the CPU what this
    process may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return host_memory().total_bytes


def load_empty(section: ModelSection, kind: Kind) -> PreTrainedModel:
    """``empty_model`` of the causal model, or of the classifier. Raises ModelError as
    ``load_pretrained`` does, for a model without weights, too."""
    config = load_config(section)
    check_kind(config, kind, section.name_or_path)
    return empty_model(config, task_type_of(kind), section.trust_remote_code)


def empty_model(
    config: PreTrainedConfig, task_type: TaskType, trust_remote_code: bool, **options: Any
) -> PreTrainedModel:
    """The model on the ``meta`` device, which has shapes and no values, with further ``options`` of
    transformers. Raises ModelError if transformers has no such class."""
    with explained(str(config.name_or_path), WRONG_CONFIG), torch.device("meta"), quiet():
        model: PreTrainedModel = loader(task_type).from_config(
            config, trust_remote_code=trust_remote_code, **options
        )
    return model
