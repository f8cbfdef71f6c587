"""Several adapters on one base model, of which one or none is in place: ``lorakit.switch``.

What an adapter puts in place of the base's own is made ready when it is loaded; a switch exchanges
the two, so that the base's weights are never written and are there again afterwards. Only
``merged=True`` writes them: the bare values of those matrices are kept in the host's memory."""

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
from lorakit.adapters.peft.place import find_places, fully_trained_modules, load_adapter
from lorakit.adapters.peft.read import AdapterFiles
from lorakit.errors import AdapterError
from lorakit.layers import BaseWrapper, adapted_modules

_ATTRIBUTE = "_lorakit_adapters"


@dataclass
class _Own:
    """What belongs to one adapter, by the base model's names.

    ``settings`` (of the model's configuration), ``parameters`` (trained ones of the base) and
    ``modules`` (trained whole) hold the adapter's while it is off, and the base's while it is on.
    """

    settings: dict[str, Any]
    parameters: dict[str, Tensor]
    modules: dict[str, nn.Module]
    layers: dict[str, BaseWrapper] = field(default_factory=dict)


@dataclass
class _Held:
    """The adapters of a model. ``absent`` are weights that the base's checkpoint lacks.

    ``copies`` are bare matrices, in the host's memory, ``marks`` say what state of each weight;
    ``folded`` names those that now differ from them. ``parted`` are weights that stand aside while
    their module has a merged one of its own.
    """

    absent: tuple[str, ...]
    adapters: dict[str, _Own] = field(default_factory=dict)
    current: tuple[str | None, bool] = (None, False)
    copies: dict[str, Tensor] = field(default_factory=dict)
    marks: dict[str, object] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    parted: dict[str, nn.Parameter] = field(default_factory=dict)


def switch(model: nn.Module, name: str | None, merged: bool = False) -> None:
    """Put the adapter ``name`` in place of the one that is, or with None the bare base.

    ``model`` is what ``lorakit.load(base, {name: directory, ...})`` gave. With ``merged`` the
    adapter is folded into the base weights, W_0 + delta rounded once from float32, and the forward
    pass does no more work than the base's (Hu et al. 2021, section 4.1). The next switch starts
    from W_0 again, bit for bit: ``W - B_1 A_1 + B_2 A_2`` would keep the rounding of both sums.
    Modules trained whole, trained parameters of the base and label names go with their adapter.
    Raises AdapterError for a name that was not loaded, or if a merged value is not finite; then
    the model is as it was.
    """
    held: _Held | None = getattr(model, _ATTRIBUTE, None)
    if held is None:
        raise AdapterError(
            "the model holds no adapters by name; lorakit.load(base, {name: directory, ...}) gives "
            "one that does"
        )
    if name is not None and name not in held.adapters:
        names = ", ".join(held.adapters)
        raise AdapterError(f"adapter {name!r}: not loaded; allowed: {names}, None (the bare base)")
    before = held.current
    if before == (name, merged):
        return
    with torch.no_grad():
        _take_off(model, held)
        try:
            _put_on(model, held, name, merged)
        except BaseException:
            _take_off(model, held)
            _put_on(model, held, *before)
            raise
    if name is None and held.absent:
        listed = ", ".join(held.absent)
        warnings.warn(f"the base has no {listed}: the values are random", stacklevel=2)


def hold(
    model: nn.Module,
    adapters: Mapping[str, AdapterFiles],
    settings: Mapping[str, dict[str, Any]],
    absent: Iterable[str] = (),
) -> None:
    """Make ``adapters`` ready for ``switch`` and put the first in place; ``model`` is the bare
    base. ``settings`` are what each sets in the model's configuration. Raises AdapterError if one
    does not fit, as ``load_adapter`` does; then the model is as it was."""
    held = _Held(tuple(sorted(absent)))
    for name, files in adapters.items():
        held.adapters[name] = _prepared(model, files, settings[name])
    setattr(model, _ATTRIBUTE, held)
    switch(model, next(iter(adapters)))


def _prepared(model: nn.Module, files: AdapterFiles, settings: Mapping[str, Any]) -> _Own:
    """Load the adapter over copies of what it would write into, then take it off again."""
    places = find_places(model, files)
    memo: dict[int, Any] = {}  # one for all: modules that share a weight go on sharing it
    modules = {
        name: copy.deepcopy(model.get_submodule(name), memo)
        for name in fully_trained_modules(model, places)
    }
    own = _Own(dict(settings), _copies(model, places.base), modules)
    _exchange(model, own)
    try:
        load_adapter(model, files)
        own.layers = adapted_modules(model)
    finally:
        for name, layer in own.layers.items():
            model.set_submodule(name, layer.base_layer)
        _exchange(model, own)
    return own


def _copies(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the parameters ``names``, under every name that shares them."""
    found: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    found.update(model.named_parameters(remove_duplicate=False))
    wanted = {id(found[name]) for name in names}
    memo: dict[int, Any] = {}
    return {n: copy.deepcopy(value, memo) for n, value in found.items() if id(value) in wanted}


def _put_on(model: nn.Module, held: _Held, name: str | None, merged: bool) -> None:
    if name is not None:
        own = held.adapters[name]
        _exchange(model, own)
        held.current = (name, merged)
        if merged:
            _fold(model, held, own)
        else:
            for place, layer in own.layers.items():
                model.set_submodule(place, _following(layer, layer.base_layer))
    held.current = (name, merged)


def _take_off(model: nn.Module, held: _Held) -> None:
    """Leave the bare base; also where ``_put_on`` broke off."""
    name, _ = held.current
    if name is None:
        return
    own = held.adapters[name]
    for place, layer in own.layers.items():
        model.set_submodule(place, layer.base_layer)
    for place in held.folded:
        weight = _weight(model.get_submodule(place))
        weight.copy_(held.copies[place])
        held.marks[place] = _mark(weight)
    for place, weight in held.parted.items():
        module = model.get_submodule(place)
        module.weight = _beside(weight, _weight(module))
    held.folded.clear()
    held.parted.clear()
    _exchange(model, own)
    held.current = (None, False)


def _fold(model: nn.Module, held: _Held, own: _Own) -> None:
    """Write W_0 + delta into each adapted matrix. One that other modules share, or that is the
    adapter's, stands aside for a merged one."""
    sharing = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name, layer in own.layers.items():
        module = layer.base_layer
        weight = _weight(module)
        _following(layer, module)
        merged = layer.fold(weight).to(weight.dtype)
        check_finite(f"{name}.weight", merged)
        if sharing[id(weight)] > 1 or f"{name}.weight" in own.parameters:
            held.parted[name] = weight
            module.weight = nn.Parameter(merged, requires_grad=False)
        else:
            if held.marks.get(name) != _mark(weight):
                held.copies[name] = weight.detach().to("cpu", copy=True)
            held.folded.append(name)
            weight.copy_(merged)


def _exchange(model: nn.Module, own: _Own) -> None:
    """The adapter's settings, parameters and modules for the model's; a second call undoes it."""
    for key, value in own.settings.items():
        config: Any = model.config
        own.settings[key] = getattr(config, key, None)
        setattr(config, key, value)
    for name, parameter in own.parameters.items():
        owner, _, end = name.rpartition(".")
        module = model.get_submodule(owner)
        own.parameters[name] = getattr(module, end)
        setattr(module, end, _beside(parameter, own.parameters[name]))
    for name, module in own.modules.items():
        own.modules[name] = model.get_submodule(name)
        model.set_submodule(name, _following(module, own.modules[name]))


def _following(module: nn.Module, other: nn.Module) -> nn.Module:
    """``module`` on the device and in the mode of ``other``, which the caller may have moved."""
    if (parameter := next(other.parameters(), None)) is not None:
        module.to(parameter.device)
    return module.train(other.training)


def _beside(value: Any, other: Tensor) -> Any:
    """``value``, the same object, on the device of ``other``."""
    value.data = value.data.to(other.device)
    return value


def _mark(weight: Tensor) -> object:
    """Equal while nothing has written to the weight; a new object where torch does not count."""
    counted = not weight.is_inference()
    return (weight.data_ptr(), weight.dtype, weight._version) if counted else object()


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter), type(weight)
    return weight
