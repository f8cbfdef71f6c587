"""PEFT's form of a low-rank update, in which LoRA and what folds into it are saved and read."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lorakit.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer, FusedLayer, RowSlice
    from lorakit.methods.lora import Lora


def lora_settings(layers: Mapping[str, AdapterLayer], config: Any) -> dict[str, Any]:
    """The keys of ``adapter_config.json``: r and lora_alpha of the configuration, and patterns
    for the modules that differ from them."""
    ranks = {n: rank_of(layer) for n, layer in layers.items()}
    alphas = {n: _alpha(layer, ranks[n], config.use_rslora) for n, layer in layers.items()}
    return {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "rank_pattern": {n: r for n, r in ranks.items() if r != config.r},
        "alpha_pattern": {n: alpha for n, alpha in alphas.items() if alpha != config.lora_alpha},
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "init_lora_weights": True,
    }


def lora_tensors(layers: Mapping[str, AdapterLayer]) -> dict[str, Tensor]:
    """A and B of every layer by PEFT's names."""
    tensors = {}
    for name, layer in layers.items():
        method: Any = layer.method
        for stored, factor in zip(_peft_names(layer.kind), method.factors(layer), strict=True):
            tensors[f"{name}.{stored}"] = factor.detach()
    return tensors


def read_layer(
    method: Lora,
    module: nn.Module,
    name: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    **more: tuple[str, tuple[int, ...]],
) -> AdapterLayer:
    """A layer with A and B of the file; r is what the tensors have, and what ``settings`` scale by.

    ``more``: parameter -> the file's name for it and its shape, besides A and B.
    """
    import torch

    from lorakit.layers import AdapterLayer

    layer = AdapterLayer(module, method, r=peft_rank(settings, name), scaling=1.0)
    layer.scaling = peft_scaling(settings, name, layer.r)
    stored_A, stored_B = _peft_names(layer.kind)
    wanted = {
        "lora_A": (stored_A, (layer.r, layer.in_features)),
        "lora_B": (stored_B, (layer.out_features, layer.r)),
        **more,
    }
    check_names(name, tensors, {stored for stored, _ in wanted.values()})
    for parameter, (stored, shape) in wanted.items():
        value = checked_value(layer, name, stored, tensors[stored], shape)
        layer.register_parameter(parameter, torch.nn.Parameter(value, requires_grad=False))
    layer.lora_dropout = torch.nn.Dropout(settings.get("lora_dropout", 0.0))
    return layer


def check_names(name: str, tensors: Collection[str], wanted: set[str]) -> None:
    """Raise AdapterError if the file's tensors of the module ``name`` are not those ``wanted``."""
    extra, lacking = set(tensors) - wanted, wanted - set(tensors)
    kinds = (("unknown", extra), ("missing", lacking))
    if found := [
        f"{kind} tensors: {', '.join(f'{name}.{key}' for key in sorted(keys))}"
        for kind, keys in kinds
        if keys
    ]:
        raise AdapterError("; ".join(found))


def checked_value(
    layer: AdapterLayer, name: str, stored: str, value: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """``value`` in float32 on the layer's device, in memory of its own: inside a file's it may lie
    at any address, on which the last bits of a product depend. Raises AdapterError for another
    shape."""
    import torch

    if tuple(value.shape) != shape:
        raise AdapterError(
            f"{name}.{stored} is {tuple(value.shape)}, and the model with r = {layer.r} needs "
            f"{shape}: the adapter belongs to another base model"
        )
    device = value.device if layer.weight.is_meta else layer.weight.device
    return value.to(device, torch.float32, copy=True)


def rank_of(layer: AdapterLayer) -> int:
    """The rank of the update as it is saved: ``pissa`` has its start beside it."""
    return layer.r * (2 if hasattr(layer, "initial_A") else 1)


def compose(method: Lora, fused: FusedLayer) -> AdapterLayer:
    """The A of the parts one below the other, each B in its own rows and columns, zero elsewhere:
    exactly the same update, of the parts' ranks together, as a layer of ``method``."""
    import torch

    from lorakit.layers import AdapterLayer

    parts: dict[str, Any] = fused.parts
    factors = {role: part.method.factors(part) for role, part in parts.items()}
    A = torch.cat([a.detach() for a, _ in factors.values()])
    scaling = next(iter(parts.values())).scaling
    layer = AdapterLayer(fused.base_layer, method, r=len(A), scaling=scaling)
    B = A.new_zeros(layer.out_features, layer.r)
    at = 0
    for role, (_, own) in factors.items():
        columns = B[:, at : at + own.shape[1]]
        fused.rows(role).put(columns, own.detach() * (parts[role].scaling / scaling))
        at += own.shape[1]
    layer.lora_A = torch.nn.Parameter(A, requires_grad=False)
    layer.lora_B = torch.nn.Parameter(B, requires_grad=False)
    layer.lora_dropout = next(iter(parts.values())).lora_dropout
    return layer


def split(
    method: Lora, layer: AdapterLayer, parts: Mapping[str, tuple[RowSlice, int]]
) -> FusedLayer:
    """The parts, role -> (rows, r), of what ``compose`` made. Raises AdapterError if they do not
    fit, or if it has values outside of them."""
    import torch

    from lorakit.layers import AdapterLayer, FusedLayer, RowsOf

    found, at = {}, 0
    rest = layer.lora_B.detach().clone()
    for role, (rows, r) in parts.items():
        if not rows.fit(layer.out_features):
            raise AdapterError(f"the part {role}, {rows}, does not fit {layer.out_features} rows")
        part = AdapterLayer(RowsOf(layer.base_layer, rows), method, r=r, scaling=layer.scaling)
        columns = slice(at, at + r)
        factors = {"lora_A": layer.lora_A[columns], "lora_B": rows.of(layer.lora_B[:, columns])}
        for factor, value in factors.items():
            own = torch.nn.Parameter(value.detach().clone(), requires_grad=False)
            part.register_parameter(factor, own)
        part.lora_dropout = layer.lora_dropout
        rows.put(rest[:, columns], torch.zeros_like(part.lora_B))
        found[role] = part
        at += r
    if at != layer.r or rest.any():
        raise AdapterError(f"the parts {', '.join(parts)} are not all that the tensors hold")
    return FusedLayer(layer.base_layer, found)


def _alpha(layer: AdapterLayer, r: int, use_rslora: bool) -> float:
    """The lora_alpha that PEFT needs for the layer's scaling, without the last bits' noise."""
    return round(layer.scaling * (math.sqrt(r) if use_rslora else r), 10)


def _peft_names(kind: str) -> tuple[str, str]:
    """What PEFT puts after the module's name for A and for B."""
    stem = "lora_embedding_{}" if kind == "embedding" else "lora_{}.weight"
    return stem.format("A"), stem.format("B")


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's meaning: the first key, a regular expression, that a dotted end of ``name`` fits."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def peft_rank(settings: Mapping[str, Any], name: str) -> int:
    """The rank that ``adapter_config.json`` gives the module."""
    return int(_by_pattern(settings.get("rank_pattern"), name, settings.get("r", 8)))


def peft_alpha(settings: Mapping[str, Any], name: str) -> float:
    """The lora_alpha that ``adapter_config.json`` gives the module."""
    alpha = _by_pattern(settings.get("alpha_pattern"), name, settings.get("lora_alpha", 8))
    return float(alpha)


def peft_scaling(settings: Mapping[str, Any], name: str, r: int) -> float:
    """What PEFT multiplies B A by. Raises AdapterError if that is not finite."""
    alpha = peft_alpha(settings, name)
    scaling = alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
    if not math.isfinite(scaling):
        raise AdapterError(f"{name}: lora_alpha = {alpha}: allowed: a finite number")
    return scaling
