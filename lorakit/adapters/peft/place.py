"""Applies an adapter's tensors to a loaded base model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from lorakit.adapters.peft.lora import from_peft
from lorakit.adapters.peft.parameters import parameter_views, with_parameter_names
from lorakit.adapters.peft.read import AdapterFiles, read_adapter, split_key
from lorakit.adapters.peft.schema import (
    BASE_LAYER,
    TOKEN_ROWS,
    is_fully_trained,
    modules_to_save,
)
from lorakit.adapters.peft.single_experts import with_stacked_experts
from lorakit.adapters.peft.targets import matched_modules, renamed_for
from lorakit.adapters.peft.tokens import StoredRows, place_stored_rows, stored_rows
from lorakit.adapters.peft.vocabulary import (
    check_vocabulary,
    extended_vocabulary,
    layers_of,
    needed_size,
)
from lorakit.base_weight import ADAPTABLE, ParameterView
from lorakit.errors import AdapterError, listed
from lorakit.injection import InjectionReport, find_heads, report
from lorakit.layers import BaseWrapper, adapted_modules, adapter_layers
from lorakit.models.master_weights import set_value, train_module, train_parameter
from lorakit.models.token_rows import token_rows
from lorakit.notes import Say, to_stderr
from lorakit.parameters import Replacement, with_adapted_parameters

_ADAPTED = (*ADAPTABLE, ParameterView)
_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass
class Placement:
    """Where each tensor of ``files`` goes. All names are those of the model.

    ``adapters``: module or parameter -> PEFT's suffix -> factor; ``base``: trained parameters of
    the base; ``fully_trained``: parameters of fully trained modules; ``rows``: layer -> trained
    rows of its weight; ``unknown``: tensors without a module. ``parameters``: the adapted
    parameters of modules that are not linear layers.
    """

    files: AdapterFiles
    parameters: Mapping[str, ParameterView]
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    fully_trained: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, StoredRows] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    @property
    def given(self) -> dict[str, Tensor]:
        """All values that replace those of the base, without the rows."""
        return {**self.base, **self.fully_trained}


@dataclass(frozen=True)
class FittedAdapter:
    """An adapter that fits a model, which it does not change yet: the adapter layers, and the names
    of the modules that it replaces as a whole. ``places`` has the names of the model."""

    places: Placement
    layers: dict[str, Replacement]
    fully_trained: list[str]


def load_adapter(
    model: nn.Module,
    adapter: str | Path | AdapterFiles,
    *,
    trainable: bool = False,
    say: Say = to_stderr,
) -> InjectionReport:
    """Apply an adapter to a loaded base model, in place. ``say`` receives notes.

    The embeddings are extended if the adapter was trained with a larger vocabulary. On a base on
    the ``meta`` device only the adapter layers and rows receive values. Raises AdapterError,
    and leaves the model unchanged, unless every tensor has a place and every module that the
    configuration names has its tensors.
    """
    files = adapter if isinstance(adapter, AdapterFiles) else read_adapter(adapter, say)
    places = find_places(model, files)
    with extended_vocabulary(model, vocabulary_with(model, places)):
        fitted = fit_adapter(model, places, say)
    layers, fully_trained = fitted.layers, fitted.fully_trained
    files = places.files
    model.requires_grad_(False)
    for key in [name for name in model.state_dict() if name in places.base]:
        if trainable:
            train_parameter(model, key)
        set_value(model, key, places.base[key])
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    files.method.link(adapter_layers(model))
    _untie(model, places.fully_trained)
    heads = tuple(f"{head}." for head in find_heads(model))
    for name in fully_trained:
        train_module(model, name, float32_output=f"{name}.".startswith(heads))
    for key, value in places.fully_trained.items():
        set_value(model, key, value)
    _set_trainable(model, layers, fully_trained, trainable, files.method.shared)
    place_stored_rows(model, places.rows, trainable)
    return report(model, files.method.name, fully_trained)


def vocabulary_with(model: nn.Module, places: Placement) -> int | None:
    """Return the size of the vocabulary of ``model`` with the adapter; None if it has none."""
    return needed_size(model, places.given, places.adapters, places.rows)


def fit_adapter(model: nn.Module, places: Placement, say: Say) -> FittedAdapter:
    """Build the layers of an adapter for ``model``, which remains unchanged. Raises AdapterError as
    ``load_adapter`` does."""
    if adapted_modules(model) or token_rows(model):
        raise AdapterError("the model already has an adapter; load the base again")
    files = places.files
    fully_trained = fully_trained_modules(model, places)
    check_vocabulary(files.directory, model, places.given, places.adapters)
    _check_complete(model, places, fully_trained)
    _check_adapted_once(model, places)
    layers = _layers(model, places)
    if note := _bypassed_note(model, files, layers):
        say(note)
    _check_shapes(model, files, places.given)
    return FittedAdapter(places, layers, fully_trained)


def find_places(model: nn.Module, files: AdapterFiles) -> Placement:
    """Assign every tensor to the module of ``model`` that its name starts with."""
    files = renamed_for(model, with_parameter_names(model, files))
    if files.config["peft_type"] == "LORA":
        files = with_stacked_experts(model, files)
    parameters = parameter_views(model, files.config)
    modules = dict(model.named_modules()) | parameters
    places = Placement(files, parameters)
    rows: dict[str, Tensor] = {}
    for key, value in files.tensors.items():
        name, end = split_key(key, modules)
        own = set(modules[name].state_dict(keep_vars=True)) if name else set()
        if end == TOKEN_ROWS and name:
            rows[name] = value
        elif end in own:
            in_base = files.trains_base and not is_fully_trained(files.config, name)
            (places.base if in_base else places.fully_trained)[key] = value
        elif not files.method.kinds or not isinstance(modules.get(name), _ADAPTED):
            places.unknown.append(key)
        elif end.startswith(BASE_LAYER) and end.removeprefix(BASE_LAYER) in own:
            places.base[f"{name}.{end.removeprefix(BASE_LAYER)}"] = value
        else:
            places.adapters.setdefault(name, {})[end] = value
    try:
        places.rows = stored_rows(files.config, rows, layers_of(model))
    except AdapterError as error:
        raise AdapterError(f"{files.directory}: {error}") from error
    return places


def fully_trained_modules(model: nn.Module, places: Placement) -> list[str]:
    """Return the topmost modules that the adapter replaces as a whole. Like PEFT, this matches
    suffixes without regard to dots."""
    config = places.files.config
    suffixes = modules_to_save(config)
    names = [n for n, m in model.named_modules() if n.endswith(suffixes) and m.state_dict()]
    covered = tuple(f"{name}." for name in names)
    names += [key.rpartition(".")[0] for key in places.fully_trained if not key.startswith(covered)]
    names = list(dict.fromkeys(names))
    topmost = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    # A head without tensors in the file remains that of the base.
    listed_suffixes = tuple(config.get("modules_to_save") or ())
    return [
        n for n in topmost if n.endswith(listed_suffixes) or _has_tensors(places.fully_trained, n)
    ]


def _check_complete(model: nn.Module, places: Placement, fully_trained: Iterable[str]) -> None:
    modules = dict(model.named_modules())
    matched = matched_modules(places.files.config, model)
    matched = {name for name in matched if isinstance(modules[name], ADAPTABLE)}
    matched |= set(places.parameters)
    missing = [f"{name} (adapter)" for name in sorted(matched - set(places.adapters))]
    missing += [
        f"{name}.{key}"
        for name in fully_trained
        for key in modules[name].state_dict()
        if f"{name}.{key}" not in places.fully_trained
    ]
    missing += [
        name
        for name in _trained_biases(model, places)
        if name not in places.base and name not in places.fully_trained
    ]
    problems = []
    if places.unknown:
        stacked = any(_SINGLE_EXPERT.search(name) for name in places.unknown) and any(
            name.endswith(".experts") for name in modules
        )
        reason = " (its experts are stacked; allowed for them: LoRA)" if stacked else ""
        problems.append(f"the model has no module for {listed(places.unknown, most=8)}{reason}")
    if missing:
        problems.append(f"the adapter lacks {listed(missing, most=8)}")
    if problems:
        directory = places.files.directory
        base = places.files.config.get("base_model_name_or_path")
        trained_on = f" (the adapter was trained on {base})" if base else ""
        raise AdapterError(
            f"{directory}: does not fit the model{trained_on}: {'; '.join(problems)}"
        )


def _trained_biases(model: nn.Module, places: Placement) -> list[str]:
    """The biases outside fully trained modules that PEFT trains with this ``bias``."""
    bias = str(places.files.config.get("bias"))
    names = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if bias.endswith("_only"):
        names = [name for name in names if name.removesuffix(".bias") in places.adapters]
    elif bias != "all":
        return []
    return [name for name in names if not is_fully_trained(places.files.config, name)]


def _layers(model: nn.Module, places: Placement) -> dict[str, Replacement]:
    files = places.files
    layers: dict[str, BaseWrapper] = {}
    method, parts = files.method, files.parts
    modules: dict[str, nn.Module] = {
        name: places.parameters.get(name) or model.get_submodule(name) for name in places.adapters
    }
    try:
        for name, tensors in places.adapters.items():
            own = {**tensors, **files.shared}
            layer = from_peft(method, modules[name], name, files.config, own)
            layers[name] = layer.split(parts[name]) if name in parts else layer
        method.check_shared(modules, files.config, files.shared)
        return with_adapted_parameters(model, layers)
    except AdapterError as error:
        raise AdapterError(f"{files.directory}: {error}") from error


def _check_adapted_once(model: nn.Module, places: Placement) -> None:
    modules = dict(model.named_modules())
    rows = {id(modules[name].weight) for name in places.rows}
    if both := [n for n in places.adapters if id(getattr(modules.get(n), "weight", None)) in rows]:
        raise AdapterError(
            f"{places.files.directory}: {both[0]} has both an adapter and rows of "
            "trainable_token_indices: not supported, nor by PEFT"
        )


def _bypassed_note(model: nn.Module, files: AdapterFiles, names: Iterable[str]) -> str | None:
    """A note if Mamba's ``dt_proj`` is adapted, whose mixer reads the weight and bias directly."""
    bypassed = [
        name
        for name in names
        if name.endswith(".dt_proj")
        and "Mamba" in type(model.get_submodule(name.rpartition(".")[0])).__name__
    ]
    if not bypassed:
        return None
    return (
        f"{files.directory}: {listed(bypassed, most=2)}: the mixer reads the parameters without "
        "calling the layer, so its adapter may have no effect until it is merged"
    )


def _check_shapes(model: nn.Module, files: AdapterFiles, values: Mapping[str, Tensor]) -> None:
    for key, value in values.items():
        have = _at(model, key).shape
        if have != value.shape:
            raise AdapterError(
                f"{files.directory}: {key} has shape {tuple(value.shape)}, and {tuple(have)} in "
                "the model: the adapter belongs to another base model or number of labels"
            )


def _untie(model: nn.Module, fully_trained: Mapping[str, Tensor]) -> None:
    """Separate tied parameters that do not all receive the same values."""
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name.replace(f".{BASE_LAYER}", "."))
    for names in shared.values():
        given = [name for name in names if name in fully_trained]
        if len(given) < len(names) or any(
            not fully_trained[n].equal(fully_trained[given[0]]) for n in given
        ):
            for key in given if len(names) > 1 else ():
                name, _, end = key.rpartition(".")
                own = _at(model, key).detach().clone()
                setattr(model.get_submodule(name), end, nn.Parameter(own, requires_grad=False))


def _set_trainable(
    model: nn.Module,
    layers: Mapping[str, Replacement],
    fully_trained: Iterable[str],
    trainable: bool,
    frozen: Collection[str],
) -> None:
    for layer in layers.values():
        for name, parameter in layer.named_parameters():
            if not name.startswith(BASE_LAYER):
                parameter.requires_grad_(trainable and name not in frozen)
    for name in fully_trained:
        model.get_submodule(name).requires_grad_(trainable)


def _at(model: nn.Module, key: str) -> Tensor:
    name, _, end = key.rpartition(".")
    value = getattr(model.get_submodule(name), end)
    assert isinstance(value, Tensor)
    return value


def _has_tensors(values: Mapping[str, Tensor], name: str) -> bool:
    return any(key.startswith(f"{name}.") for key in values)
