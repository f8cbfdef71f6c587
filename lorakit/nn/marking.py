"""Which parameters train, and which are saved: those named ``lora_*`` and, if asked, biases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor, nn

from lorakit.errors import UserError, shown

Bias = Literal["none", "all", "lora_only"]


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Every parameter with ``lora_`` in its name trains; the others are frozen.

    ``bias``: those that train too: ``none``, ``all`` (``bias`` in the name), or ``lora_only`` (the
    biases of the layers that hold factors). Models adapted by ``lorakit.inject`` fit as well.
    Raises UserError for another ``bias``.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = _chosen(parameters, bias)
    trained = {id(parameters[name]) for name in chosen}
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in trained)


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """What ``mark_only_lora_as_trainable`` lets train with the same ``bias``, by its name in
    ``model.state_dict()``; load it with ``strict=False``. Raises UserError for another ``bias``.
    """
    state = model.state_dict()
    return {name: state[name] for name in _chosen(state, bias)}


def _chosen(names: Iterable[str], bias: str) -> list[str]:
    if bias not in ("none", "all", "lora_only"):
        raise UserError(f"bias = {shown(bias)}: allowed: none, all, lora_only")
    names = list(names)
    beside = {bias for name in names if "lora_" in name for bias in _biases_beside(name)}
    return [
        name
        for name in names
        if "lora_" in name
        or (bias == "all" and "bias" in name)
        or (bias == "lora_only" and name in beside)
    ]


def _biases_beside(factor: str) -> tuple[str, ...]:
    """Where the bias of the layer that holds ``factor`` may stand: beside it; in the module that
    inject wraps; or, for a part of a fused projection, in the one that holds the parts."""
    layer = factor.rpartition("lora_")[0]
    whole = layer[:-1].rpartition(".")[0]
    return f"{layer}bias", f"{layer}base_layer.bias", f"{whole}.base_layer.bias"
