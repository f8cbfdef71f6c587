"""Factors that are cast once per pass give the losses and gradients of those cast in each layer."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from lorakit.injection import inject
from lorakit.layers import adapter_layers
from lorakit.methods.adalora import AdaLoraConfig
from lorakit.methods.dora import DoraConfig
from lorakit.methods.lora import LoraConfig
from lorakit.recipe.sections import AdapterSection
from lorakit.training.engine.staging import StagedFactors, counted_calls
from tests.families import tiny

TARGETS = ["q", "v", "gate_proj"]
CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=TARGETS),
    "pissa": LoraConfig(r=4, target_modules=TARGETS, init="pissa"),
    "adalora": AdaLoraConfig(method="adalora", init_r=4, target_r=2, target_modules=TARGETS),
    "dora": DoraConfig(r=4, target_modules=TARGETS),
}


def losses_and_gradients(config: AdapterSection, staged: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = tiny("llama").to(torch.bfloat16)
    inject(model, config)
    layers = adapter_layers(model)
    parameters = [p for layer in layers.values() for p in layer.adapter_parameters().values()]
    for parameter in parameters:
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))
        parameter.grad = torch.zeros_like(parameter)
    factors = StagedFactors(layers.values(), torch.bfloat16) if staged else None
    model.train()
    losses = []
    for start in (0, 5):
        ids = torch.arange(start, start + 12)[None]
        with nullcontext() if factors is None else factors.training():
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in parameters if p.grad is not None)]


@pytest.mark.parametrize("method", CONFIGS)
def test_equal_to_the_bit(method: str) -> None:
    plain = losses_and_gradients(CONFIGS[method], staged=False)
    staged = losses_and_gradients(CONFIGS[method], staged=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, staged, strict=True))
    assert any(gradient.any() for gradient in plain[2:])


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_between_passes_layers_have_their_latest_factors(method: str) -> None:
    """Those are exported and merged."""
    model = tiny("llama").to(torch.bfloat16)
    inject(model, CONFIGS[method])
    layers = adapter_layers(model).values()
    for layer in layers:
        for parameter in layer.adapter_parameters().values():
            parameter.grad = torch.zeros_like(parameter)
    staged = StagedFactors(layers, torch.bfloat16)
    before = [layer.delta_weight() for layer in layers]
    with staged.training():
        assert all(layer.factors()[0].dtype == torch.bfloat16 for layer in layers)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.adapter_parameters().values():
                parameter.add_(torch.randn_like(parameter))
    assert all(factor.dtype == torch.float32 for layer in layers for factor in layer.factors())
    for old, layer in zip(before, layers, strict=True):
        assert not torch.equal(layer.delta_weight(), old)


def test_the_gradient_of_an_embedding_is_summed_in_float32() -> None:
    """A token may occur many times."""
    gradients = []
    for staged in (False, True):
        torch.manual_seed(0)
        model = tiny("llama").to(torch.bfloat16)
        inject(model, LoraConfig(r=4, target_modules=["embed_tokens"]))
        [layer] = adapter_layers(model).values()
        for parameter in layer.adapter_parameters().values():
            parameter.grad = torch.zeros_like(parameter)
        with StagedFactors([layer], torch.bfloat16).training() if staged else nullcontext():
            layer(torch.tensor([7] * 1000 + [8] * 24)).float().square().sum().backward()
        gradients.append(layer.lora_A.grad)
    assert torch.equal(*gradients)
    assert gradients[0].any()


@pytest.mark.parametrize(("family", "calls"), [("bert", 1), ("albert", 2)])
def test_calls_of_layers_are_counted(family: str, calls: int) -> None:
    """ALBERT's layers are one module."""
    model = tiny(family)
    inject(model, LoraConfig(r=4, target_modules=["q"]))
    layers = list(adapter_layers(model).values())
    with counted_calls(layers) as counts:
        model(input_ids=torch.arange(8)[None])
    model(input_ids=torch.arange(8)[None])
    assert counts == [calls] * len(layers)
