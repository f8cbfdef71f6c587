"""Switches between several adapters of one base model: ``lorakit.switch``.

The layers, modules and parameters of each adapter are prepared when it is loaded, and a switch
swaps them with those of the base, whose weights are never modified. Only ``merged=True`` writes to
them, and keeps a copy of the original matrices in host memory.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.merge.plan import check_finite
from lorakit.adapters.peft.place import (
    find_places,
    fully_trained_modules,
    load_adapter,
    vocabulary_with,
)
from lorakit.adapters.peft.read import AdapterFiles
from lorakit.adapters.peft.vocabulary import vocabulary_size
from lorakit.base_weight import version_of
from lorakit.errors import AdapterError
from lorakit.parameters import AdaptedParameters, Replacement, replaced_modules

_ATTRIBUTE = "_lorakit_adapters"


@dataclass
class _Adapter:
    """The objects that one adapter swaps, by the base model's names.

    ``settings`` of the model's configuration, trained ``parameters`` of the base and fully trained
    ``modules`` are the adapter's while it is inactive, and the base's while it is active.
    ``dtypes`` are those in which their counterparts were placed in the model, which the caller may
    convert.
    """

    settings: dict[str, Any]
    parameters: dict[str, Tensor]
    modules: dict[str, nn.Module]
    layers: dict[str, Replacement] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


@dataclass
class _State:
    """The adapters of a model. ``absent`` are weights that the base's checkpoint lacks.

    ``copies`` are original matrices in host memory, ``versions`` the state of each weight when it
    was copied; ``merged`` names those that now differ. ``replaced`` are weights whose module has a
    separate merged weight in the meantime.
    """

    absent: tuple[str, ...]
    adapters: dict[str, _Adapter] = field(default_factory=dict)
    current: tuple[str | None, bool] = (None, False)
    copies: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, object] = field(default_factory=dict)
    merged: list[str] = field(default_factory=list)
    replaced: dict[str, nn.Parameter] = field(default_factory=dict)


def switch(model: nn.Module, name: str | None, merged: bool = False) -> None:
    """Activate the adapter ``name``, or none of them (None: the bare base).

    ``model`` is the result of ``lorakit.load(base, {name: directory, ...})``. With ``merged`` the
    adapter is merged into the base weights, W_0 + delta rounded once from float32, and the forward
    pass costs as much as the base's (Hu et al. 2021, section 4.1). The next switch starts from W_0
    again, bit for bit: ``W - B_1 A_1 + B_2 A_2`` would accumulate rounding. Fully trained modules,
    trained parameters of the base and label names are switched with their adapter.
    Raises AdapterError for an unknown name, or if a merged value is not finite. The model is then
    unchanged.
    """
    state: _State | None = getattr(model, _ATTRIBUTE, None)
    if state is None:
        raise AdapterError(
            "the model has no named adapters; hint: load it with "
            "lorakit.load(base, {name: directory, ...})"
        )
    if name is not None and name not in state.adapters:
        names = ", ".join(state.adapters)
        raise AdapterError(f"adapter {name!r}: not loaded; allowed: {names}, None (the bare base)")
    before = state.current
    if before == (name, merged):
        return
    with torch.no_grad():
        _deactivate(model, state)
        try:
            _activate(model, state, name, merged)
        except BaseException:
            _deactivate(model, state)
            _activate(model, state, *before)
            raise
    if name is None and state.absent:
        listed = ", ".join(state.absent)
        warnings.warn(f"the base has no {listed}: the values are random", stacklevel=2)


def register_adapters(
    model: nn.Module,
    adapters: Mapping[str, AdapterFiles],
    settings: Mapping[str, dict[str, Any]],
    absent: Iterable[str] = (),
) -> None:
    """Prepare ``adapters`` for ``switch`` and activate the first; ``model`` is the bare base.

    ``settings``: adapter -> its keys of the model's configuration. Raises AdapterError like
    ``load_adapter`` if an adapter does not fit. The model is then unchanged.
    """
    state = _State(tuple(sorted(absent)))
    for name, files in adapters.items():
        state.adapters[name] = _prepared(model, files, settings[name])
    setattr(model, _ATTRIBUTE, state)
    switch(model, next(iter(adapters)))


def _prepared(model: nn.Module, files: AdapterFiles, settings: Mapping[str, Any]) -> _Adapter:
    """Load the adapter on copies of the objects that it would modify, then remove it again."""
    places = find_places(model, files)
    if vocabulary_with(model, places) != vocabulary_size(model) or places.rows:
        raise AdapterError(
            f"{files.directory}: trains rows of the vocabulary, which cannot be switched; allowed: "
            "load it alone, or merge it"
        )
    memo: dict[int, Any] = {}  # a common one, so that modules that share a weight still do
    modules = {
        name: copy.deepcopy(model.get_submodule(name), memo)
        for name in fully_trained_modules(model, places)
    }
    adapter = _Adapter(dict(settings), _copies(model, places.base), modules)
    _swap(model, adapter)
    try:
        load_adapter(model, files)
        adapter.layers = replaced_modules(model)
    finally:
        for name, layer in adapter.layers.items():
            model.set_submodule(name, layer.base_layer)
        adapter.dtypes.clear()  # loading converts modules, which is no conversion by the caller
        _swap(model, adapter)
    return adapter


def _copies(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the parameters ``names``, under every name that refers to them."""
    found: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    found.update(model.named_parameters(remove_duplicate=False))
    wanted = {id(found[name]) for name in names}
    memo: dict[int, Any] = {}
    return {n: copy.deepcopy(value, memo) for n, value in found.items() if id(value) in wanted}


def _activate(model: nn.Module, state: _State, name: str | None, merged: bool) -> None:
    if name is not None:
        adapter = state.adapters[name]
        _swap(model, adapter)
        state.current = (name, merged)
        if merged:
            _merge(model, state, adapter)
        else:
            for place, layer in adapter.layers.items():
                model.set_submodule(place, _matched(layer, layer.base_layer))
    state.current = (name, merged)


def _deactivate(model: nn.Module, state: _State) -> None:
    """Restore the bare base, also after an ``_activate`` that failed."""
    name, _ = state.current
    if name is None:
        return
    adapter = state.adapters[name]
    for place, layer in adapter.layers.items():
        model.set_submodule(place, layer.base_layer)
    for place in state.merged:
        weight = _weight(model.get_submodule(place))
        weight.copy_(state.copies[place])
        state.versions[place] = version_of(weight)
    for place, weight in state.replaced.items():
        module = model.get_submodule(place)
        merged = _weight(module)
        _move(weight, merged.device, merged.dtype)
        module.weight = weight
    state.merged.clear()
    state.replaced.clear()
    _swap(model, adapter)
    state.current = (None, False)


def _merge(model: nn.Module, state: _State, adapter: _Adapter) -> None:
    """Write W_0 + delta to each adapted matrix. If other modules share it, or if it is the
    adapter's own, a separate merged weight replaces it."""
    sharing = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name, layer in adapter.layers.items():
        if isinstance(layer, AdaptedParameters):
            raise AdapterError(
                f"merged = True: not supported for {name}, of which parameters are adapted; hint: "
                "lorakit.merge"
            )
        module = layer.base_layer
        if layer.bias_delta() is not None:
            raise AdapterError(
                f"{name}: its adapter has a bias (lora_bias), which is not merged in place; "
                "allowed: merged=False"
            )
        weight = _weight(module)
        _matched(layer, module)
        merged = layer.fold(weight).to(weight.dtype)
        check_finite(f"{name}.weight", merged)
        if sharing[id(weight)] > 1 or f"{name}.weight" in adapter.parameters:
            state.replaced[name] = weight
            module.weight = nn.Parameter(merged, requires_grad=False)
        else:
            if state.versions.get(name) != version_of(weight):
                state.copies[name] = weight.detach().to("cpu", copy=True)
            state.merged.append(name)
            weight.copy_(merged)


def _swap(model: nn.Module, adapter: _Adapter) -> None:
    """Swap settings, parameters and modules of adapter and model; a second call undoes it."""
    for key, value in adapter.settings.items():
        config: Any = model.config
        adapter.settings[key] = getattr(config, key, None)
        setattr(config, key, value)
    for name, parameter in adapter.parameters.items():
        owner, _, end = name.rpartition(".")
        module = model.get_submodule(owner)
        other = adapter.parameters[name] = getattr(module, end)
        _move(parameter, other.device, _conversion(adapter, name, other))
        adapter.dtypes[name] = parameter.dtype
        setattr(module, end, parameter)
    for name, module in adapter.modules.items():
        replaced = adapter.modules[name] = model.get_submodule(name)
        if (before := next(replaced.parameters(), None)) is not None:
            module.to(dtype=_conversion(adapter, name, before))
        model.set_submodule(name, _matched(module, replaced))
        if (now := next(module.parameters(), None)) is not None:
            adapter.dtypes[name] = now.dtype


def _conversion(adapter: _Adapter, name: str, placed: Tensor) -> torch.dtype | None:
    """The dtype to which the caller has converted ``placed`` since it was placed in the model."""
    return placed.dtype if adapter.dtypes.get(name, placed.dtype) != placed.dtype else None


def _matched(module: nn.Module, other: nn.Module) -> nn.Module:
    """``module`` on the device and in the mode of ``other``, which the caller may have changed."""
    if (parameter := next(other.parameters(), None)) is not None:
        module.to(parameter.device)
    return module.train(other.training)


def _move(value: Tensor, device: torch.device, dtype: torch.dtype | None) -> None:
    """Move the values of ``value``, the same object, and convert them unless ``dtype`` is None."""
    value.data = value.data.to(device, dtype or value.dtype)


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter), type(weight)
    return weight
