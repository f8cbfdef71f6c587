"""PEFT's form of AdaLoRA on disk, and the same as plain LoRA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorakit.methods.adalora import AdaLora, kept_rows, scaling_of
from lorakit.methods.lora import METHOD as LORA
from lorakit.methods.lora import LoraConfig
from lorakit.methods.lora_form import check_names, checked_value, lora_settings, lora_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer, FusedLayer


def as_adalora(
    layers: Mapping[str, AdapterLayer], config: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``ADALORA``: the kept triplets, and in ``rank_pattern`` which of init_r they are.

    PEFT builds each layer with init_r triplets, takes away those that the pattern does not keep,
    and divides lora_alpha by init_r all the same. It asks for a schedule: that of the run.
    """
    tinit, tfinal, total_steps = next(
        (layer.schedule for layer in layers.values() if hasattr(layer, "schedule")), (0, 0, 1)
    )
    kept = {name: kept_rows(layer) for name, layer in layers.items()}
    pruned = any(len(kept[name]) < layer.r for name, layer in layers.items())
    settings = {
        "peft_type": "ADALORA",
        **config.model_dump(
            include={"init_r", "target_r", "lora_alpha", "lora_dropout", "bias"}
            | {"deltaT", "beta1", "beta2", "orth_reg_weight"}
        ),
        "tinit": tinit,
        "tfinal": tfinal,
        "total_step": total_steps,
        "rank_pattern": {
            f"{name}.lora_E": [i in rows for i in range(layers[name].r)]
            for name, rows in kept.items()
        }
        if pruned
        else None,
        "init_lora_weights": True,
    }
    tensors = {}
    for name, layer in layers.items():
        rows = kept[name]
        tensors[f"{name}.lora_A"] = layer.lora_A.detach()[rows]
        tensors[f"{name}.lora_E"] = layer.lora_E.detach()[rows]
        tensors[f"{name}.lora_B"] = layer.lora_B.detach()[:, rows]
    return settings, tensors


def read_adalora(
    method: AdaLora,
    module: nn.Module,
    name: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> AdapterLayer:
    """A layer with the triplets of the file, as many as it has; none is one that adds nothing."""
    import torch

    from lorakit.layers import AdapterLayer

    check_names(name, tensors, {"lora_A", "lora_B", "lora_E"})
    init_r = settings.get("init_r", 12)
    pattern = (settings.get("rank_pattern") or {}).get(f"{name}.lora_E")
    r = init_r if pattern is None else sum(pattern)
    scaling = scaling_of(settings.get("lora_alpha", 8), init_r)
    if r == 0 and not any(value.numel() for value in tensors.values()):
        ends = {"lora_A": (1, -1), "lora_E": (1, 1), "lora_B": (-1, 1)}
        r, tensors = 1, {f: _zero(tensors[f], shape) for f, shape in ends.items()}
    layer = AdapterLayer(module, method, r=r, scaling=scaling)
    shapes = {
        "lora_A": (r, layer.in_features),
        "lora_B": (layer.out_features, r),
        "lora_E": (r, 1),
    }
    for factor, shape in shapes.items():
        value = checked_value(layer, name, factor, tensors[factor], shape)
        layer.register_parameter(factor, torch.nn.Parameter(value, requires_grad=False))
    kept = torch.ones(r, dtype=torch.bool, device=layer.lora_E.device)
    layer.register_buffer("kept", kept, persistent=False)
    layer.lora_dropout = torch.nn.Dropout(settings.get("lora_dropout", 0.0))
    return layer


def _zero(empty: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zeros of ``shape``, of which -1 is the size that ``empty`` has."""
    sizes = [have if want < 0 else want for have, want in zip(empty.shape, shape, strict=True)]
    return empty.new_zeros(sizes)


def fold(layer: AdapterLayer) -> AdapterLayer:
    """A plain LoRA of the kept triplets: A' = Lambda Q, B' = P, the same scaling."""
    import torch

    from lorakit.layers import AdapterLayer

    rows = kept_rows(layer)
    folded = AdapterLayer(layer.base_layer, LORA, r=len(rows), scaling=layer.scaling)
    A = (layer.lora_A * layer.lora_E).detach()[rows]
    folded.lora_A = torch.nn.Parameter(A, requires_grad=False)
    folded.lora_B = torch.nn.Parameter(layer.lora_B.detach()[:, rows], requires_grad=False)
    folded.lora_dropout = layer.lora_dropout
    return folded


def compose_as_lora(fused: FusedLayer) -> AdapterLayer:
    from lorakit.layers import FusedLayer

    folded = {role: fold(part) for role, part in fused.parts.items()}
    return LORA.compose(FusedLayer(fused.base_layer, folded))


def as_lora(
    layers: Mapping[str, AdapterLayer], config: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``LORA`` with the commonest rank as r, and a lora_alpha for each that keeps the scaling."""
    folded = {n: fold(x) if isinstance(x.method, AdaLora) else x for n, x in layers.items()}
    r = Counter(layer.r for layer in folded.values()).most_common(1)[0][0]
    alpha = scaling_of(config.lora_alpha, config.init_r) * r
    plain = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=config.lora_dropout, bias=config.bias)
    return lora_settings(folded, plain), lora_tensors(folded)
