"""Hub or directory -> model and tokenizer, of the right kind, from safetensors only.

Where a model runs that no launcher places.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from lorakit.errors import ModelError
from lorakit.models.heads import declares_head, in_head, plan_head, renew_head, stores_head
from lorakit.models.hub import hub_resolves, is_missing_path, other_content
from lorakit.models.tokenizer import load_tokenizer
from lorakit.recipe.check import has_accelerator
from lorakit.recipe.sections import ModelSection

Kind = Literal["causal", "encoder"]
_SEES = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


@dataclass(frozen=True)
class Pretrained:
    """``new_modules`` are those whose weights the checkpoint lacks (a fresh classification head);
    ``notes`` say what was chosen or changed for the user."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_modules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_pretrained(
    section: ModelSection,
    kind: Kind,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    *,
    head_given: bool = False,
) -> Pretrained:
    """The model in evaluation mode, in ``section.dtype``, and its tokenizer with a pad token.

    For an encoder ``labels`` are the class names, None for regression. A head that the checkpoint
    holds is used as ``plan_head`` says, with its own labels; one that it lacks is drawn from
    ``seed``. ``head_given``: an adapter brings the head, with ``labels``, whatever the base's is.
    Raises ModelError if the model is missing, gated, unreachable, of the other kind, not in
    safetensors, if its head does not fit, or if weights other than a head's are missing.
    """
    name = section.name_or_path
    hub = hub_options(section)
    config = load_config(section)
    check_kind(config, kind, name)
    options: dict[str, Any] = {**hub, "dtype": getattr(torch, section.dtype)}
    if section.attn_implementation != "auto":
        options["attn_implementation"] = section.attn_implementation
    tokenizer, notes = load_tokenizer(name, hub)
    if kind == "causal":
        model, info = _from_pretrained(AutoModelForCausalLM, name, config, options, seed)
        check_shapes(info["mismatched_keys"], name)
    elif head_given:
        model, info = _classifier(name, config, labels, options, seed)
    else:
        model, info, note = _with_head(section, config, labels, options, seed)
        notes += [note] if note else []
    model.config.pad_token_id = tokenizer.pad_token_id
    new = _new_modules(model, info, kind, name)
    return Pretrained(model.eval(), tokenizer, new, tuple(notes))


def _with_head(
    section: ModelSection,
    config: PreTrainedConfig,
    labels: Sequence[str] | None,
    options: Mapping[str, Any],
    seed: int,
) -> tuple[PreTrainedModel, dict[str, Any], str | None]:
    """The classifier with the checkpoint's head, or a new one, and what is to say of it."""
    name = section.name_or_path
    plan, misfit = None, None
    try:
        plan = plan_head(labels, config, section.new_head, name)
    except ModelError as error:  # raised below, if the checkpoint has a head at all
        misfit = error
    expected = plan.labels if plan is not None and declares_head(config) else labels
    model, info = _classifier(name, config, expected, options, seed)
    if not stores_head(model, info):
        if expected != labels:
            model, info = _classifier(name, config, labels, options, seed)
        return model, info, None
    if misfit is not None:
        raise misfit
    assert plan is not None, "there is a plan or a misfit"
    if expected != plan.labels:
        model, info = _classifier(name, config, plan.labels, options, seed)
    if plan.fresh:
        info["missing_keys"] |= {f"{module}." for module in renew_head(model, seed)}
    return model, info, plan.note


def _classifier(
    name: str,
    config: PreTrainedConfig,
    labels: Sequence[str] | None,
    options: Mapping[str, Any],
    seed: int,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The base with a head for ``labels``; the head's tensors of another size are drawn anew."""
    config = copy.deepcopy(config)
    for key, value in label_options(labels).items():
        setattr(config, key, value)
    model, info = _from_pretrained(AutoModelForSequenceClassification, name, config, options, seed)
    check_shapes([key for key in info["mismatched_keys"] if not in_head(model, key[0])], name)
    return model, info


def _from_pretrained(
    loader: Any, name: str, config: PreTrainedConfig, options: Mapping[str, Any], seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    torch.manual_seed(seed)
    with explained(name), quiet():
        model, info = loader.from_pretrained(
            name, config=config, output_loading_info=True,
            use_safetensors=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    return model, {**info, "missing_keys": {*info["missing_keys"]}}


def load_config(section: ModelSection, key: str = "model.name_or_path") -> PreTrainedConfig:
    """The model's configuration alone. Raises ModelError as ``load_pretrained`` does; ``key`` is
    what the message says that the name was given as."""
    name, path = section.name_or_path, Path(section.name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        what = other_content(path)
        raise ModelError(
            f"{key}: {name}: no config.json in the directory" + (f" ({what})" if what else "")
        )
    if path.is_file():
        what = other_content(path) or "a file"
        raise ModelError(
            f"{key}: {name}: {what}; allowed: a model directory in the format of "
            "transformers, or a Hub id"
        )
    if is_missing_path(name):
        hint = (
            "; a Hub id is namespace/name" if name.count("/") > 1 and name[0] not in "/.~" else ""
        )
        raise ModelError(f"{key}: {name}: no such directory{hint}")
    with explained(name, key), quiet():
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **hub_options(section))
    with suppress(ValueError):  # several text parts: of no kind that is trained here
        text = config.get_text_config()
        if getattr(config, "tie_word_embeddings", False) and text is not config:
            # The whole's class reads its own flag; an output layer that is stored apart stays so.
            text.tie_word_embeddings = True
    return config


def hub_options(section: ModelSection) -> dict[str, Any]:
    """What every ``from_pretrained`` gets; without a network only the local cache is asked."""
    options = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    if not Path(section.name_or_path).is_dir() and not hub_resolves():
        options["local_files_only"] = True
    return {key: value for key, value in options.items() if value is not None}


def label_options(labels: Sequence[str] | None) -> dict[str, Any]:
    """The configuration keys of a classification head; None means regression."""
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(labels))
    return {
        "num_labels": len(labels),
        "id2label": names,
        "label2id": {label: index for index, label in names.items()},
        "problem_type": "single_label_classification",
    }


def check_kind(
    config: PreTrainedConfig, kind: Kind, name: str, key: str = "model.name_or_path"
) -> None:
    """Raise ModelError for a model that lorakit has no class for, or that is of the other kind;
    ``key`` is that of ``load_config``."""
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if kind == "encoder" and getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{key}: {name}: {config.model_type} is an encoder with a decoder, and "
            "the task needs an encoder alone; allowed: a model such as BERT, RoBERTa or ModernBERT"
        )
    encoder = masked and not getattr(config, "is_decoder", False)
    brings_code = hasattr(config, "auto_map")
    if kind == "causal" and config.model_type in _SEES and not causal and not brings_code:
        raise ModelError(
            f"{key}: {name}: {config.model_type} is multimodal, and transformers has "
            "no class for training it on text alone: not supported yet; allowed: a decoder such as "
            "Llama, Qwen or GPT-2, or a multimodal Gemma 3, Qwen3.5 or Llama 4"
        )
    if kind == "causal" and (encoder or not causal) and not brings_code:
        raise ModelError(
            f"{key}: {name}: {config.model_type} is not a causal language model, and "
            "the task needs one; allowed: a decoder such as Llama, Qwen, Gemma or GPT-2"
        )


def check_shapes(mismatched: Iterable[Any], name: str, key: str = "model.name_or_path") -> None:
    """Raise ModelError for the first of transformers' (tensor, stored shape, model's shape)."""
    for tensor, stored, wanted in sorted(mismatched, key=lambda entry: str(entry[0])):
        raise ModelError(
            f"{key}: {name}: {tensor} is {tuple(stored)}, and the configuration says "
            f"{tuple(wanted)}"
        )


def _new_modules(model: PreTrainedModel, info: Any, kind: Kind, name: str) -> tuple[str, ...]:
    missing = sorted(info["missing_keys"])
    base = [key for key in missing if kind == "causal" or _is_backbone(model, key)]
    if base:
        raise ModelError(
            f"model.name_or_path: {name}: the checkpoint lacks {len(base)} weights of "
            f"{type(model).__name__}, {base[0]} among them"
        )
    modules = {key.rpartition(".")[0] for key in missing}
    return tuple(sorted(module for module in modules if module))


def _is_backbone(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight belongs to the pretrained part; a pooler may be new, as a head is."""
    return key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key


@contextmanager
def explained(name: str, key: str = "model.name_or_path") -> Iterator[None]:
    """Turn what transformers and the Hub raise into one line that begins with ``key: name``."""
    from huggingface_hub import errors as hub

    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        chain = [error]
        while chain[-1].__cause__ or chain[-1].__context__:
            chain.append(chain[-1].__cause__ or chain[-1].__context__)  # type: ignore[arg-type]
        kinds = tuple(type(link) for link in chain)
        # The second line says what is wrong where the first only says with which field.
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(said[:2]) or type(error).__name__
        if any(issubclass(kind, hub.GatedRepoError) for kind in kinds):
            reason = (
                "the repository is gated; accept its terms on the Hub and log in (hf auth login)"
            )
        elif any(issubclass(kind, hub.LocalEntryNotFoundError) for kind in kinds) or (
            "offline" in str(error) or "couldn't connect" in str(error)
        ):
            reason = (
                "no such directory, not in the local cache, and the Hub cannot be reached "
                "(no network, or HF_HUB_OFFLINE is set)"
            )
        elif any(issubclass(kind, hub.RepositoryNotFoundError) for kind in kinds):
            reason = "no such directory, and no such repository on the Hub (or it is private)"
        elif isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        elif re.search(r"file named \S*safetensors", str(error)):
            reason = (
                "no safetensors weights; lorakit loads no pickles: convert the checkpoint first"
            )
        elif "trust_remote_code" in str(error):
            run = (
                "set model.trust_remote_code: true"
                if key.startswith("model.")
                else ("give --trust-remote-code (in Python trust_remote_code=True)")
            )
            reason = f"the model brings its own code; {run} to run it"
        raise ModelError(f"{key}: {name}: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the loaders' bars and reports: what matters of them is checked here."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_logger = logging.getLogger("huggingface_hub")
    hub_level = hub_logger.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logger.setLevel(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()


def default_device() -> torch.device:
    """The machine's accelerator (CUDA, ROCm, Apple), or the CPU. ``ACCELERATE_USE_CPU`` and an
    empty ``CUDA_VISIBLE_DEVICES`` hide it, as they do in training."""
    if has_accelerator():
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
    return torch.device("cpu")
