"""Adapter layers in PEFT's LoRA and AdaLoRA formats, written and read.

LoRA, DoRA and every method that folds into a plain LoRA share the first; AdaLoRA has its own. A
method with another format overrides ``Method.to_peft`` and ``Method.from_peft``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lorakit.adapters.peft.initialization import INITIALIZATION
from lorakit.adapters.peft.parameters import stacked_factors, stored_factors, wrapper_names
from lorakit.adapters.peft.ranks import peft_alpha_of, peft_rank, peft_scaling
from lorakit.adapters.peft.schema import (
    ADALORA_FACTORS,
    FACTOR_BIAS,
    MAGNITUDE,
    factor_names,
)
from lorakit.adapters.peft.variants import BiasedLayer, ReinitializedLayer, variant_class
from lorakit.base_weight import ParameterView, dense_weight, kind_of
from lorakit.errors import AdapterError
from lorakit.layers import AdapterLayer
from lorakit.methods.adalora import AdaLora, scaling_of
from lorakit.methods.adalora_layer import AdaLoraLayer
from lorakit.methods.base import Method
from lorakit.methods.dora_layer import DoraLayer
from lorakit.methods.lora import Lora, LoraConfig
from lorakit.methods.lora_layer import LoraLayer

#: Parameter -> the suffix of its tensor name in the file, and its shape.
_Wanted = dict[str, tuple[str, tuple[int, ...]]]
#: Keys of AdaLoRA's configuration that are written to ``adapter_config.json`` unchanged.
_ADALORA_KEYS = {
    "init_r", "target_r", "lora_alpha", "lora_dropout", "bias", "deltaT", "beta1", "beta2",
    "orth_reg_weight",
}  # fmt: skip


def to_peft(
    method: Method, layers: dict[str, AdapterLayer], config: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the method's keys of ``adapter_config.json``, and the tensors of ``layers`` under
    PEFT's names, without the prefix ``base_model.model.``."""
    if not _has_lora_format(method):
        return method.to_peft(layers, config)
    low_rank = {name: layer for name, layer in layers.items() if isinstance(layer, LoraLayer)}
    if isinstance(method, AdaLora):
        triplets = {n: layer for n, layer in layers.items() if isinstance(layer, AdaLoraLayer)}
        if len(triplets) == len(layers) and not any(
            x.kind == "parameter" for x in triplets.values()
        ):
            return _adalora_settings(triplets, config), _adalora_tensors(triplets)
        # PEFT's AdaLoRA cannot adapt slices of a fused projection and parameters, such as stacked
        # experts: Lambda is folded into A.
        return _folded_adalora(low_rank, config)
    return _lora_settings(low_rank, config), _lora_tensors(low_rank)


def from_peft(
    method: Method,
    module: nn.Module,
    name: str,
    settings: Mapping[str, Any],
    tensors: dict[str, Tensor],
) -> AdapterLayer:
    """Return the layer of the module ``name`` with the values of ``tensors``, which are keyed by
    what follows its name (``lora_A.weight``). ``settings`` is ``adapter_config.json``.

    Raises AdapterError for a tensor that is missing, unknown or misshapen.
    """
    if not _has_lora_format(method):
        return method.from_peft(module, name, settings, tensors)
    if isinstance(method, AdaLora):
        return _read_adalora(module, name, settings, tensors)
    return _read_lora(method, module, name, settings, tensors)


def _has_lora_format(method: Method) -> TypeGuard[Lora]:
    return isinstance(method, Lora) and type(method).to_peft is Method.to_peft


def _lora_settings(layers: Mapping[str, LoraLayer], config: Any) -> dict[str, Any]:
    """r and lora_alpha of the configuration, and patterns for the modules that differ."""
    ranks = {name: layer.saved_rank for name, layer in layers.items()}
    alphas = {
        name: peft_alpha_of(layer.scaling, ranks[name], config.use_rslora)
        for name, layer in layers.items()
    }
    return {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "rank_pattern": {n: r for n, r in ranks.items() if r != config.r},
        "alpha_pattern": {n: alpha for n, alpha in alphas.items() if alpha != config.lora_alpha},
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": any(isinstance(layer, DoraLayer) for layer in layers.values()),
        "init_lora_weights": True,
    }


def _lora_tensors(layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    tensors = {}
    prefixes = wrapper_names(layers)
    for name, layer in layers.items():
        factors = stored_factors(*layer.factors())
        for stored, factor in zip(factor_names(layer.kind), factors, strict=True):
            tensors[f"{prefixes[name]}.{stored}"] = factor.detach()
        if isinstance(layer, DoraLayer):
            tensors[f"{name}.{MAGNITUDE}"] = layer.lora_magnitude_vector.detach()
    return tensors


def _read_lora(
    method: Lora,
    module: nn.Module,
    name: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> AdapterLayer:
    """A layer of the rank in ``settings``, which the tensors must match."""
    r, dropout = peft_rank(settings, name), settings.get("lora_dropout", 0.0)
    scaling = peft_scaling(settings, name, r)
    layer_class = variant_class(settings, module, name) or method.layer_class()
    *stack, out_features, in_features = dense_weight(module).shape
    matrices = math.prod(stack)
    stored_A, stored_B = factor_names(kind_of(module))
    wanted: _Wanted = {
        "lora_A": (stored_A, (matrices * r, in_features)),
        "lora_B": (stored_B, (out_features, r * matrices)),
    }
    if issubclass(layer_class, DoraLayer):
        if isinstance(module, ParameterView):
            raise AdapterError(f"{name} is a parameter, to which DoRA cannot be applied")
        wanted[MAGNITUDE] = (MAGNITUDE, (out_features,))
    if issubclass(layer_class, BiasedLayer):
        wanted["lora_bias"] = (FACTOR_BIAS, (out_features,))
    values = _checked_values(name, r, tensors, wanted)
    factors = stacked_factors(values["lora_A"], values["lora_B"], tuple(stack))
    values |= zip(("lora_A", "lora_B"), factors, strict=True)
    layer = layer_class(module, r=r, scaling=scaling, dropout=dropout)
    layer.load_parameters(values, (), name)
    if isinstance(layer, ReinitializedLayer):
        layer.initialization = str(settings[INITIALIZATION])
        return layer if layer.is_meta else layer.as_lora()
    return layer


def _adalora_settings(layers: Mapping[str, AdaLoraLayer], config: Any) -> dict[str, Any]:
    """PEFT builds each layer with init_r triplets, removes those that ``rank_pattern`` does not
    keep, and still divides lora_alpha by init_r. It requires a schedule: that of the run."""
    tinit, tfinal, total_steps = next(
        (layer.schedule for layer in layers.values() if layer.schedule), (0, 0, 1)
    )
    kept = {name: layer.kept_rows() for name, layer in layers.items()}
    pruned = any(len(kept[name]) < layer.r for name, layer in layers.items())
    pattern = {
        f"{name}.{ADALORA_FACTORS.E}": [i in rows for i in range(layers[name].r)]
        for name, rows in kept.items()
    }
    return {
        "peft_type": "ADALORA",
        **config.model_dump(include=_ADALORA_KEYS),
        "tinit": tinit,
        "tfinal": tfinal,
        "total_step": total_steps,
        "rank_pattern": pattern if pruned else None,
        "init_lora_weights": True,
    }


def _adalora_tensors(layers: Mapping[str, AdaLoraLayer]) -> dict[str, Tensor]:
    """The kept triplets."""
    tensors = {}
    for name, layer in layers.items():
        rows = layer.kept_rows()
        tensors[f"{name}.{ADALORA_FACTORS.A}"] = layer.lora_A.detach()[rows]
        tensors[f"{name}.{ADALORA_FACTORS.E}"] = layer.lora_E.detach()[rows]
        tensors[f"{name}.{ADALORA_FACTORS.B}"] = layer.lora_B.detach()[:, rows]
    return tensors


def _read_adalora(
    module: nn.Module,
    name: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> AdapterLayer:
    """A layer with the triplets of the file or, if there are none, one without effect."""
    stored_A, stored_B, stored_E = ADALORA_FACTORS
    _check_names(name, tensors, set(ADALORA_FACTORS))
    init_r = settings.get("init_r", 12)
    pattern = (settings.get("rank_pattern") or {}).get(f"{name}.{stored_E}")
    r = init_r if pattern is None else sum(pattern)
    scaling = scaling_of(settings.get("lora_alpha", 8), init_r)
    if r == 0 and not any(value.numel() for value in tensors.values()):
        shapes_of_one = {stored_A: (1, -1), stored_E: (1, 1), stored_B: (-1, 1)}
        r, tensors = 1, {end: _zeros(tensors[end], shape) for end, shape in shapes_of_one.items()}
    out_features, in_features = dense_weight(module).shape
    wanted: _Wanted = {
        "lora_A": (stored_A, (r, in_features)),
        "lora_B": (stored_B, (out_features, r)),
        "lora_E": (stored_E, (r, 1)),
    }
    values = _checked_values(name, r, tensors, wanted)
    dropout = settings.get("lora_dropout", 0.0)
    layer = AdaLoraLayer(module, r=r, scaling=scaling, dropout=dropout)
    layer.load_parameters(values, (), name)
    layer.kept = torch.ones(r, dtype=torch.bool, device=layer.lora_E.device)
    return layer


def _zeros(empty: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zeros of ``shape``, where -1 is replaced by the size of ``empty``."""
    sizes = [have if want < 0 else want for have, want in zip(empty.shape, shape, strict=True)]
    return empty.new_zeros(sizes)


def _folded_adalora(
    layers: Mapping[str, LoraLayer], config: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plain LoRA with the most common rank as r, and a lora_alpha for each matrix that preserves
    its scaling."""
    folded = {n: x.as_lora() if isinstance(x, AdaLoraLayer) else x for n, x in layers.items()}
    r = Counter(layer.r for layer in folded.values()).most_common(1)[0][0]
    alpha = scaling_of(config.lora_alpha, config.init_r) * r
    plain = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=config.lora_dropout, bias=config.bias)
    return _lora_settings(folded, plain), _lora_tensors(folded)


def _check_names(name: str, tensors: Collection[str], wanted: set[str]) -> None:
    """Raise AdapterError unless the file's tensors of the module ``name`` are those ``wanted``."""
    extra, lacking = set(tensors) - wanted, wanted - set(tensors)
    kinds = (("unknown", extra), ("missing", lacking))
    if found := [
        f"{kind} tensors: {', '.join(f'{name}.{key}' for key in sorted(keys))}"
        for kind, keys in kinds
        if keys
    ]:
        raise AdapterError("; ".join(found))


def _checked_values(
    name: str, r: int, tensors: Mapping[str, Tensor], wanted: _Wanted
) -> dict[str, Tensor]:
    """The values by parameter. Raises AdapterError for a tensor that is missing, unknown or
    misshapen, before a layer of that rank is allocated."""
    _check_names(name, tensors, {stored for stored, _ in wanted.values()})
    for stored, shape in wanted.values():
        if tuple(tensors[stored].shape) != shape:
            raise AdapterError(
                f"{name}.{stored} is {tuple(tensors[stored].shape)}, and the model with r = {r} "
                f"needs {shape}: the adapter belongs to another base model"
            )
    return {parameter: tensors[stored] for parameter, (stored, _) in wanted.items()}
