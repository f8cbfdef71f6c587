"""Starts a new run from the weights of an adapter: ``adapter.init_from``.

The new adapter is injected as in any other run, and then receives the values. Keys that the recipe
leaves out are those of the adapter, so that ranks, scalings and targets are the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorakit import registry
from lorakit.adapters.base_model import other_base_note
from lorakit.adapters.low_rank import number
from lorakit.adapters.peft.place import FittedAdapter, find_places, fit_adapter
from lorakit.adapters.peft.read import AdapterFiles, read_adapter
from lorakit.adapters.peft.schema import CONFIG, WEIGHTS
from lorakit.adapters.peft.targets import target_modules, unadapted_modules
from lorakit.adapters.peft.tokens import StoredRows
from lorakit.errors import AdapterError, TargetError, UserError, listed, shown
from lorakit.injection import trained_base_parameters
from lorakit.layers import AdapterLayer, CompositeLayer, adapter_layers
from lorakit.methods.adalora import AdaLoraConfig, scaling_of
from lorakit.methods.adalora_layer import AdaLoraLayer
from lorakit.methods.base import Method
from lorakit.methods.lora import LoraConfig
from lorakit.models.hub import load_tokenizer
from lorakit.models.master_weights import set_value
from lorakit.models.token_rows import token_rows
from lorakit.notes import Say
from lorakit.parameters import AdaptedParameters, Replacement
from lorakit.recipe.sections import AdapterSection, ModelSection
from lorakit.targets import find_targets

#: Keys of AdaLoRA about the course of a run, which is a new one.
_PHASES = {"tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "orth_reg_form"}


#: Values that are not worth a mention.
_NOTHING: tuple[Any, ...] = ([], {}, False, None, 0.0, "none")


@dataclass(frozen=True)
class StartingAdapter:
    """An adapter that fits the model of a run. ``config`` is the recipe's, completed by it."""

    directory: Path
    fitted: FittedAdapter
    layers: Mapping[str, AdapterLayer]
    config: AdapterSection

    def described(self) -> dict[str, str]:
        """The adapter for ``run.json``: its directory, and a hash of its configuration and
        weights."""
        digest = hashlib.sha256()
        for name in (CONFIG, WEIGHTS):
            digest.update((self.directory / name).read_bytes())
        return {"adapter": str(self.directory), "fingerprint": digest.hexdigest()}


def read_start(
    model: nn.Module,
    section: ModelSection,
    config: AdapterSection,
    heads: Collection[str],
    say: Say,
) -> StartingAdapter:
    """Read the adapter ``config.init_from`` for ``model``, the base with ``heads`` that are always
    trained, and which has no adapter yet. ``say`` gets a line about the keys that it sets.

    Raises UserError, whose message starts with the key, if it does not fit the model or ``config``.
    """
    where = f"adapter.init_from = {shown(config.init_from)}"
    try:
        files = read_adapter(str(config.init_from), say, hint="name its method as adapter.method")
        fitted = fit_adapter(model, find_places(model, files), say)
    except AdapterError as error:
        raise UserError(f"adapter.init_from: {error}") from error
    files = fitted.places.files
    _check_method(config, files)
    _check_labels(model, files, where)
    if note := other_base_note(section, files):
        say(note)
    layers = _leaves(fitted.layers)
    completed, taken = _completed(model, config, fitted, layers, heads)
    set_here = "".join(f", {k} = {shown(v)}" for k, v in taken.items() if v not in _NOTHING)
    say(f"starting from the adapter {config.init_from}{set_here}")
    _check_ranks(completed, layers)
    return StartingAdapter(files.directory, fitted, layers, completed)


@torch.no_grad()
def load_values(model: nn.Module, start: StartingAdapter, fully_trained: Collection[str]) -> None:
    """Copy the adapter's values to the new one in ``model``. Raises UserError if the new one has
    not the same modules."""
    config, layers = start.config, adapter_layers(model)
    where = f"adapter.target_modules = {shown(getattr(config, 'target_modules', None))}"
    lacking, more = set(start.layers) - set(layers), set(layers) - set(start.layers)
    if lacking or more:
        reason = f"does not adapt {listed(sorted(lacking), most=3)}" if lacking else ""
        reason += " and " if lacking and more else ""
        reason += f"also adapts {listed(sorted(more), most=3)}" if more else ""
        raise UserError(
            f"{where}: {reason}, unlike {config.init_from}; allowed: the modules of that adapter, "
            "or leave it out"
        )
    for name, source in start.layers.items():
        _copy_layer(source, layers[name], f"{where}: {name}")
    places = start.fitted.places
    _check_untied(model, places.fully_trained, config)
    _copy_rows(model, places.rows, config)
    base = trained_base_parameters(model, tuple(fully_trained))
    for key, value in places.base.items():
        own, _, end = key.rpartition(".")
        found = next((n for n in (key, f"{own}.base_layer.{end}") if n in base), None)
        if found is None:
            raise UserError(
                f"adapter.bias = {shown(getattr(config, 'bias', None))}: {config.init_from} also "
                f"trained {key}; allowed: its bias, or leave it out"
            )
        set_value(model, found, value)
    inside = tuple(f"{name}." for name in fully_trained)
    for key, value in places.fully_trained.items():
        if not key.startswith(inside):
            raise UserError(
                f"adapter.modules_to_save = {shown(config.modules_to_save)}: {config.init_from} "
                f"also trained {key.rpartition('.')[0]}; allowed: its modules, or leave it out"
            )
        set_value(model, key, value)


def _check_method(config: AdapterSection, files: AdapterFiles) -> None:
    """Raise UserError unless the layers of both methods are the same."""
    if (init := getattr(config, "init", "default")) != "default":
        raise UserError(
            f"adapter.init = {shown(init)}: the values are those of {config.init_from}; allowed: "
            "default, or leave it out"
        )
    method: Method = registry.method(config.method)
    if type(files.method) is type(method):
        return
    reading = [
        other.name
        for other in registry.methods().values()
        if other.kinds and files.method.kinds and other.layer_class() is files.method.layer_class()
    ]
    if method.name not in reading:
        raise UserError(
            f"adapter.method = {shown(config.method)}: {config.init_from} is an adapter of "
            f"{files.method.name}; allowed: {', '.join(reading or [files.method.name])}"
        )


def _check_labels(model: nn.Module, files: AdapterFiles, where: str) -> None:
    """Raise UserError if the rows of the adapter's head are those of other labels."""
    stored = (files.sidecar or {}).get("id2label")
    own = getattr(getattr(model, "config", None), "id2label", None)
    if not (stored and own and files.classifies):
        return
    labels = [stored[index] for index in sorted(stored, key=int)]
    wanted = [own[index] for index in sorted(own, key=int)]
    if labels != wanted:
        raise UserError(
            f"{where}: its labels are {shown(labels)}, and those of the task {shown(wanted)}; "
            "allowed: the same labels in the same order (task.labels)"
        )


def _leaves(layers: Mapping[str, Replacement]) -> dict[str, AdapterLayer]:
    """The layer of each adapted matrix, named as ``adapter_layers`` does."""
    found: dict[str, AdapterLayer] = {}
    for name, layer in layers.items():
        if isinstance(layer, CompositeLayer | AdaptedParameters):
            found |= {f"{name}.{role}": part for role, part in layer.parts.items()}
        elif isinstance(layer, AdapterLayer):
            found[name] = layer
    return found


def _completed(
    model: nn.Module,
    config: AdapterSection,
    fitted: FittedAdapter,
    layers: Mapping[str, AdapterLayer],
    heads: Collection[str],
) -> tuple[AdapterSection, dict[str, Any]]:
    """Return ``config`` with the keys of the adapter that it leaves out, and these keys."""
    found = _keys(config, fitted.places.files, layers)
    if layers:
        found["target_modules"] = _targets(model, fitted, layers)
        found["target_parameters"] = fitted.places.files.config.get("target_parameters") or []
    saved = [name for name in fitted.fully_trained if name not in heads]
    found["modules_to_save"] = saved
    given, fields = config.model_fields_set, type(config).model_fields
    taken = {k: v for k, v in found.items() if k in fields and k not in given}
    values = {key: getattr(config, key) for key in given} | taken
    return type(config).model_validate(values), taken


def _keys(
    config: AdapterSection, files: AdapterFiles, layers: Mapping[str, AdapterLayer]
) -> dict[str, Any]:
    """The values of the method's own keys in the adapter."""
    stored = files.config
    if not isinstance(config, LoraConfig):
        own: set[str] = registry.method(config.method).keys() - _PHASES
        return {key: stored[key] for key in own if stored.get(key) is not None}
    use_rslora = bool(stored.get("use_rslora"))
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {
        name: number(layer.scaling * (layer.r**0.5 if use_rslora else layer.r))
        for name, layer in layers.items()
    }
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": {name: own for name, own in ranks.items() if own != r},
        "alpha_pattern": {name: float(own) for name, own in alphas.items() if own != alpha},
        "lora_dropout": float(stored.get("lora_dropout") or 0.0),
        "bias": stored.get("bias") or "none",
    }


def _targets(
    model: nn.Module, fitted: FittedAdapter, layers: Mapping[str, AdapterLayer]
) -> list[str]:
    """Targets that select the adapted modules: short suffixes, or else full names."""
    parts = {n for n, layer in fitted.layers.items() if isinstance(layer, CompositeLayer)}
    layers = {name: layer for name, layer in layers.items() if layer.kind != "parameter"}
    whole = [name for name in layers if name.rpartition(".")[0] not in parts]
    roles = sorted({name.rpartition(".")[2] for name in layers} if parts else ())
    roles = [r for r in roles if any(f"{name}.{r}" in layers for name in parts)]
    suffixes = target_modules(whole, unadapted_modules(model), {}) if whole else []
    if isinstance(suffixes, list):
        try:
            if set(find_targets(model, [*roles, *suffixes])) == set(layers):
                return [*roles, *suffixes]
        except TargetError:
            pass
    return [*roles, *whole]


def _check_ranks(config: AdapterSection, layers: Mapping[str, AdapterLayer]) -> None:
    """Raise UserError if the recipe gives another rank or scaling than the adapter's."""
    for name, layer in layers.items():
        if isinstance(config, LoraConfig):
            pairs = [("r", config.rank_of(name), layer.r),
                     ("lora_alpha", config.scaling_of(name), layer.scaling)]  # fmt: skip
        elif isinstance(layer, AdaLoraLayer):
            assert isinstance(config, AdaLoraConfig)
            init_r = config.init_r
            if layer.r > init_r:
                raise UserError(
                    f"adapter.init_r = {init_r}: {config.init_from} has rank {layer.r} in {name}; "
                    "allowed: that of the adapter, or leave it out"
                )
            pairs = [("lora_alpha", scaling_of(config.lora_alpha, init_r), layer.scaling)]
        else:
            continue
        for key, own, stored in pairs:
            if abs(own - stored) > 1e-6 * abs(stored):
                what = "rank" if key == "r" else "scaling"
                raise UserError(
                    f"adapter.{key} = {shown(getattr(config, key))}: {name} has {what} "
                    f"{number(stored):g} in {config.init_from}, and {number(own):g} here; allowed: "
                    "the adapter's, or leave it out"
                )


def _copy_layer(source: AdapterLayer, target: AdapterLayer, where: str) -> None:
    """Copy the parameters. Triplets that AdaLoRA has pruned start anew, without effect."""
    own = target.adapter_parameters()
    for key, value in source.adapter_parameters().items():
        if isinstance(target, AdaLoraLayer) and source.r < target.r:
            kept = own[key][:, : source.r] if key == "lora_B" else own[key][: source.r]
            if key == "lora_E":
                own[key].zero_()
            kept.copy_(value)
        elif key not in own or own[key].shape != value.shape:
            have = tuple(own[key].shape) if key in own else "absent"
            raise UserError(
                f"{where}.{key} is {tuple(value.shape)} in the adapter, and {have} here"
            )
        elif not own[key].requires_grad and not own[key].equal(value.to(own[key].device)):
            raise UserError(f"{where}.{key} is frozen, and has other values in the adapter")
        else:
            own[key].copy_(value)


def _copy_rows(model: nn.Module, rows: Mapping[str, StoredRows], config: AdapterSection) -> None:
    """Copy the rows of tokens. Further tokens of the new run keep their initial rows."""
    layers = token_rows(model)
    for name, stored in rows.items():
        trained = layers[name].indices.tolist() if name in layers else []
        if not set(stored.indices) <= set(trained):
            raise UserError(
                f"model.add_tokens: {config.init_from} trained rows of {name} that are not trained "
                "here; allowed: the tokens of that adapter, in the same order, and others after"
            )
        layers[name].values[[trained.index(index) for index in stored.indices]] = stored.values


def check_tokens(start: StartingAdapter, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if an id whose row the adapter trained is that of another token here."""
    file, config = start.directory / "tokenizer.json", start.config
    rows = start.fitted.places.rows.values()
    trained = {index for stored in rows for index in stored.indices}
    if not trained or not file.is_file():
        return
    own, _ = load_tokenizer(str(start.directory), {})
    for index in sorted(trained):
        theirs, here = (t.convert_ids_to_tokens(index) for t in (own, tokenizer))
        if theirs != here:
            raise UserError(
                f"model.add_tokens: id {index} is {shown(here)}, but {shown(theirs)} in "
                f"{config.init_from}; allowed: the tokens of that adapter, in the same order, and "
                "others after"
            )


def _check_untied(
    model: nn.Module, fully_trained: Mapping[str, Tensor], config: AdapterSection
) -> None:
    """Raise UserError if the adapter trained one of two weights that the model ties."""
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    for names in shared.values():
        given = [name for name in names if name in fully_trained]
        same = all(fully_trained[name].equal(fully_trained[given[0]]) for name in given)
        if given and (len(given) < len(names) or not same):
            raise UserError(
                f"adapter.init_from = {shown(config.init_from)}: it has values of its own for "
                f"{given[0]}, which the model ties to another weight; such an adapter cannot be "
                "trained further"
            )
