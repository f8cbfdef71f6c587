"""Train the rows of new tokens: ``model.add_tokens``, and special tokens of a chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from lorakit import registry
from lorakit.adapters.peft.schema import LORA_FORMATS
from lorakit.errors import TargetError, UserError, shown
from lorakit.injection import InjectionReport, report
from lorakit.layers import BaseWrapper
from lorakit.models.token_rows import place_rows, vocabulary_layers
from lorakit.module_names import describe_modules
from lorakit.recipe.sections import AdapterSection


def train_tokens(
    model: PreTrainedModel, tokens: Sequence[int], config: AdapterSection, done: InjectionReport
) -> InjectionReport:
    """Train the rows of ``tokens`` in the embedding and the output layer, after ``inject``, whose
    report is ``done``; return it with the rows. Fully trained layers train them anyway.

    Raises UserError if the method, a target or the model does not fit.
    """
    _check_method(config)
    layers = vocabulary_layers(model)
    if adapted := [n for n, layer in layers.items() if isinstance(layer, BaseWrapper)]:
        raise TargetError(
            f"adapter.target_modules: {describe_modules(adapted)}: both a target and a layer whose "
            "rows of new tokens are trained (model.add_tokens); allowed: one of them"
        )
    frozen: dict[str, Tensor] = {
        name: layer.weight  # type: ignore[misc]
        for name, layer in layers.items()
        if not layer.weight.requires_grad
    }
    for name, weight in frozen.items():
        if max(tokens) >= len(weight):
            raise UserError(
                f"model.add_tokens: {name} of {type(model).__name__} has {len(weight)} rows, fewer "
                "than the embedding; allowed: []"
            )
        if getattr(layers[name], "bias", None) is not None:
            raise UserError(
                f"model.add_tokens: {name} of {type(model).__name__} has a bias, which PEFT leaves "
                "out where it trains rows; allowed: [], or full training (modules_to_save)"
            )
    values = {name: weight.detach()[list(tokens)].float() for name, weight in frozen.items()}
    for layer in place_rows(model, tokens, values).values():
        layer.values.requires_grad_(True)
    found = report(model, config.method, done.modules_to_save)
    return dataclasses.replace(found, coverage=done.coverage)


def _check_method(config: AdapterSection) -> None:
    if registry.method(config.method).peft_type not in LORA_FORMATS:
        known = registry.methods().values()
        allowed = ", ".join(m.name for m in known if m.peft_type in LORA_FORMATS)
        raise UserError(
            f"adapter.method = {shown(config.method)}: it cannot train the rows of new tokens "
            f"(model.add_tokens, model.chat_template); allowed with them: {allowed}"
        )
