"""Writes a model's adapter as a directory that PEFT loads with equal logits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit import registry
from lorakit.adapters.card_usage import UsageFacts
from lorakit.adapters.model_card import CardFacts, model_card
from lorakit.adapters.peft.lora import to_peft
from lorakit.adapters.peft.parameters import target_parameters
from lorakit.adapters.peft.read import parse_parts
from lorakit.adapters.peft.schema import (
    CARD,
    CONFIG,
    LORA_FORMATS,
    PREFIX,
    SHARED_PREFIX,
    SIDECAR,
    WEIGHTS,
    without_defaults,
)
from lorakit.adapters.peft.targets import (
    BaseNames,
    exact_patterns,
    misread_by_peft,
    refused_by_peft,
    target_modules,
    unadapted_modules,
)
from lorakit.adapters.peft.tokens import rows_to_peft
from lorakit.errors import AdapterError, shown
from lorakit.injection import find_fully_trained, trained_base_parameters
from lorakit.io.atomic import atomic_directory, check_name, os_errors
from lorakit.io.tensors import save_tensors
from lorakit.layers import AdapterLayer, BaseWrapper, CompositeLayer, adapted_modules
from lorakit.methods.base import Method
from lorakit.models.kinds import TaskType
from lorakit.models.master_weights import base_dtype, plain_name
from lorakit.models.token_rows import token_rows
from lorakit.recipe.sections import AdapterSection
from lorakit.version import __version__


def save_adapter(
    directory: str | Path,
    model: nn.Module,
    config: AdapterSection,
    *,
    base_model_name_or_path: str,
    task_type: TaskType,
    method: Method | None = None,
    revision: str | None = None,
    names: BaseNames | None = None,
    modules_to_save: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: CardFacts | None = None,
    lorakit_info: Mapping[str, Any] | None = None,
    replaces_head: bool = False,
) -> Path:
    """Write the adapter of ``model`` in PEFT's format, or in lorakit's own if PEFT does not support
    the method. An existing adapter directory is replaced. Returns the directory.

    ``method`` is by default the one that ``config`` names. ``names`` translates module names if
    ``model`` is only the text part of the base. ``modules_to_save`` are the fully trained modules.
    By default they are those outside the adapter layers that require gradients or, if the method
    trains the base's own parameters, those that ``inject`` trains fully. ``lorakit_info`` is added
    to ``lorakit.json``; ``replaces_head`` says that the base has another classification head.
    Raises AdapterError if the model has no adapter, or ``directory`` is not an adapter directory.
    """
    directory = Path(directory)
    method = method or registry.method(config.method)
    fully_trained = _modules_to_save(model, config, method, modules_to_save)
    if (
        not adapted_modules(model)
        and not fully_trained
        and not trained_base_parameters(model, fully_trained)
    ):
        raise AdapterError(f"{directory}: the model has no adapter to save")
    _check_replaceable(directory)
    saved = _collect(model, config, method, fully_trained, names)
    base = {"base_model_name_or_path": base_model_name_or_path, "revision": revision}
    settings = saved.settings | base | {"task_type": task_type}
    if method.peft_type in LORA_FORMATS:
        settings = without_defaults(settings)
    info = saved.info | {"task_type": task_type} | dict(lorakit_info or {})
    facts = card or CardFacts(base_model_name_or_path, method.name)
    use = card_usage(directory, method.name, settings, info, tokenizer is not None)
    use = dataclasses.replace(use, peft_loads=method.peft_loads, replaces_head=replaces_head)
    with atomic_directory(directory, replace=True) as folder, os_errors(Exception, directory):
        write_files(folder, settings, _stored(saved.tensors, saved.shared), info)
        write_card(folder, facts, settings, use)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return directory


def write_files(
    folder: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
) -> None:
    """Write ``adapter_config.json``, the weights and ``lorakit.json`` (``info``). ``tensors`` have
    PEFT's full names and do not share memory."""
    _write_json(folder / CONFIG, settings)
    save_tensors(tensors, folder / WEIGHTS)
    _write_json(folder / SIDECAR, info)


def write_card(
    folder: Path, facts: CardFacts, settings: Mapping[str, Any], use: UsageFacts
) -> None:
    """Write the model card, with what ``adapter_config.json`` (``settings``) adds to it."""
    text = model_card(_completed(facts, settings), use)
    (folder / CARD).write_text(text, encoding="utf-8")


def card_usage(
    directory: Path,
    method: str,
    settings: Mapping[str, Any],
    info: Mapping[str, Any],
    has_tokenizer: bool,
) -> UsageFacts:
    """Return what the code of the model card depends on. ``directory`` is the adapter's,
    ``settings`` and ``info`` are the contents of its two JSON files."""
    labels = info.get("id2label") or {}
    is_lora = settings["peft_type"] == "LORA"
    return UsageFacts(
        base_model=settings["base_model_name_or_path"],
        directory=str(directory),
        method=method,
        task_type=settings.get("task_type") or "CAUSAL_LM",
        revision=settings.get("revision"),
        labels=[labels[key] for key in sorted(labels, key=int)],
        problem_type=info.get("problem_type"),
        pairs=len(info.get("text_columns") or ()) == 2,
        chats=info.get("task") == "chat",
        has_tokenizer=has_tokenizer,
        base_class=info.get("base_class"),
        misread=info.get("misread_by_peft", ()) if is_lora else (),
        refused=info.get("refused_by_peft", ()),
        vocab_size=info.get("vocab_size"),
    )


@dataclasses.dataclass(frozen=True)
class _Contents:
    """Contents of ``adapter_config.json``, the weights file and ``lorakit.json``."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    shared: Mapping[str, Tensor]
    info: dict[str, Any]


def _collect(
    model: nn.Module,
    config: AdapterSection,
    method: Method,
    fully_trained: Sequence[str],
    names: BaseNames | None,
) -> _Contents:
    adapted = adapted_modules(model)
    renamed: Callable[[str], str] = names or str
    info = _sidecar(model, method, adapted, renamed)
    layers = {renamed(name): layer.joined() for name, layer in adapted.items()}
    settings, tensors = to_peft(method, layers, config)
    base_parameters = {
        renamed(n): value for n, value in trained_base_parameters(model, fully_trained).items()
    }
    tensors |= base_parameters
    if not method.kinds:
        settings["trained_parameters"] = sorted(base_parameters)
    row_settings, rows = rows_to_peft(model, renamed)
    settings |= row_settings
    tensors |= rows
    for name in fully_trained:
        state = model.get_submodule(name).state_dict()
        tensors |= {f"{renamed(name)}.{key}": value for key, value in state.items()}
    settings["modules_to_save"] = [renamed(name) for name in fully_trained] or None
    if names is not None:
        info["base_class"] = type(names.own).__name__
    if method.peft_loads:
        own = names.own if names else model
        _complete_for_peft(settings, layers, own)
        modules = [name for name, layer in layers.items() if layer.kind != "parameter"]
        if misread := misread_by_peft(own, modules):
            info["misread_by_peft"] = misread
        if refused := refused_by_peft(own, layers):
            info["refused_by_peft"] = refused
    first = next(iter(layers.values()), None)
    shared = {name: first.get_parameter(name) for name in method.shared} if first else {}
    return _Contents(settings, tensors, shared, info)


def _modules_to_save(
    model: nn.Module,
    config: AdapterSection,
    method: Method,
    modules_to_save: Sequence[str] | None,
) -> list[str]:
    if modules_to_save is not None:
        fully_trained = list(modules_to_save)
    elif method.kinds:
        fully_trained = _fully_trained(model)
    else:
        fully_trained = list(find_fully_trained(model, config))
    return fully_trained + _sharing(model, fully_trained)


def _complete_for_peft(
    settings: dict[str, Any], layers: Mapping[str, AdapterLayer], model: nn.Module
) -> None:
    settings["inference_mode"] = True
    transposed = any(layer.kind == "conv1d" for layer in layers.values())
    if transposed or settings["peft_type"] in LORA_FORMATS:
        settings["fan_in_fan_out"] = transposed
    modules = [name for name, layer in layers.items() if layer.kind != "parameter"]
    settings["target_modules"] = target_modules(modules, unadapted_modules(model), settings)
    if parameters := [name for name in layers if name not in modules]:
        settings["target_parameters"] = target_parameters(parameters, model)
    if settings["peft_type"] == "LORA":
        for key in settings.keys() & {"rank_pattern", "alpha_pattern"}:
            settings[key] = exact_patterns(settings[key], layers)


def _stored(tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by name, float32, contiguous, and copied since tied modules share memory."""
    named = {PREFIX + name: value for name, value in tensors.items()}
    named |= {SHARED_PREFIX + name: value for name, value in shared.items()}
    out = {}
    for name in sorted(named):
        value = named[name].detach().to("cpu", copy=True).contiguous()
        assert value.numel(), f"{name} is empty: a shard was not gathered"
        out[name] = value.float() if value.is_floating_point() else value
    return out


def _fully_trained(model: nn.Module) -> list[str]:
    """The topmost modules outside adapter layers whose parameters are all trained. Parameters with
    an fp32 master weight do not count, since they are trained parameters of the base."""
    adapted = tuple(f"{name}." for name in (*adapted_modules(model), *token_rows(model)))
    trains: dict[str, bool] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inside = name.startswith(adapted) or plain_name(name) != name
        parts = name.split(".")[:-1]
        for depth in range(1, len(parts) + 1):
            module = ".".join(parts[:depth])
            trains[module] = trains.get(module, True) and parameter.requires_grad and not inside
    fully_trained = [name for name, all_train in trains.items() if all_train]
    return [
        n for n in fully_trained if not any(n.startswith(f"{other}.") for other in fully_trained)
    ]


def _sharing(model: nn.Module, fully_trained: Sequence[str]) -> list[str]:
    """Modules outside ``fully_trained`` that share its parameters (tied embeddings). Both are
    saved, since other programs may not tie them."""
    values = {id(p) for name in fully_trained for p in model.get_submodule(name).parameters()}
    inside = tuple(f"{name}." for name in fully_trained)
    return [
        name
        for name, module in model.named_modules()
        if any(id(p) in values for p in module.parameters(recurse=False))
        and not f"{name}.".startswith(inside)
    ]


def _sidecar(
    model: nn.Module,
    method: Method,
    layers: Mapping[str, BaseWrapper],
    renamed: Callable[[str], str],
) -> dict[str, Any]:
    info: dict[str, Any] = {"lorakit_version": __version__, "method": method.name}
    if method.digest is not None:
        info["method_digest"] = method.digest
    weight = next((layer.weight for layer in layers.values()), None)
    dtype = base_dtype(model) if weight is None else weight.dtype
    info["base_dtype"] = str(dtype).removeprefix("torch.")
    fused = {
        renamed(name): layer for name, layer in layers.items() if isinstance(layer, CompositeLayer)
    }
    if fused:
        info["parts"] = {name: _parts(name, layer) for name, layer in fused.items()}
    if isinstance(model, PreTrainedModel):
        info["pad_token_id"] = getattr(model.config, "pad_token_id", None)
        if "Classification" in type(model).__name__:
            labels = model.config.id2label or {}
            info["id2label"] = {str(index): label for index, label in labels.items()}
            info["problem_type"] = model.config.problem_type
    return info


def _parts(name: str, layer: CompositeLayer) -> dict[str, Any]:
    """Role -> its rows, and its rank in the saved tensors. Raises AdapterError if they could not be
    read again."""
    parts = {
        role: dataclasses.asdict(layer.rows(role)) | {"r": part.saved_rank}
        for role, part in layer.parts.items()
    }
    try:
        parse_parts(parts)
    except (TypeError, ValueError):
        raise AdapterError(
            f"{name}: the parts {', '.join(parts)} cannot be saved; allowed: q, k and v, without "
            "overlap and of one period"
        ) from None
    return parts


def _completed(facts: CardFacts, settings: Mapping[str, Any]) -> CardFacts:
    targets = settings.get("target_modules", ())
    return dataclasses.replace(
        facts,
        r=facts.r or settings.get("r") or settings.get("target_r"),
        lora_alpha=facts.lora_alpha or settings.get("lora_alpha"),
        target_modules=facts.target_modules or ([targets] if isinstance(targets, str) else targets),
        target_parameters=settings.get("target_parameters") or [],
        modules_to_save=facts.modules_to_save or settings.get("modules_to_save") or [],
    )


def _check_replaceable(directory: Path) -> None:
    try:
        check_name(directory)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise AdapterError(f"{shown(str(directory))}: cannot be written: {reason}") from error
    if directory.is_symlink():
        raise AdapterError(f"{directory}: is a symbolic link; not replaced")
    if directory.is_dir():
        if any(directory.iterdir()) and not (directory / CONFIG).is_file():
            raise AdapterError(f"{directory}: not empty and not an adapter; not replaced")
    elif directory.exists():
        raise AdapterError(f"{directory}: exists and is not a directory")


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(f"{text}\n", encoding="utf-8")
