"""Fused layers: which ones share a product, and the numbers of the layers by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.anatomy import transformer_layers
from lorakit.errors import UserError
from lorakit.injection import inject
from lorakit.layers import adapter_layers
from lorakit.methods.lora import LoraConfig
from lorakit.methods.lora_layer import LoraLayer
from lorakit.training.fast_layers import compile_layers, fuse_layers
from tests.families import tiny

IDS = torch.arange(24).view(2, 12)


def adapted(family: str, dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    model = tiny(family).to(torch.bfloat16)
    inject(model, LoraConfig(r=4, target_modules=["all-linear"], lora_dropout=dropout))
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for parameter in layer.adapter_parameters().values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loss_and_gradients(model: PreTrainedModel) -> list[Tensor]:
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_compiled_layers_are_as_exact_as_eager_ones(family: str) -> None:
    plain = adapted(family)
    fused = adapted(family)
    exact = loss_and_gradients(adapted(family).float())
    fuse_layers(fused)
    for layer in transformer_layers(fused):
        layer.compile(backend="aot_eager")
    assert apart(loss_and_gradients(fused), exact) < 2 * apart(loss_and_gradients(plain), exact)


def test_checkpointed_layers_are_compiled_as_others() -> None:
    found = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        model = adapted("llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        fuse_layers(model)
        compile_layers(model, backend="aot_eager")
        found.append(loss_and_gradients(model))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The distance of all values, relative to their norm."""
    left, right = (torch.cat([value.flatten().float() for value in v]) for v in (found, wanted))
    return float((left - right).norm() / right.norm())


def test_layers_of_one_input_share_its_product() -> None:
    model = adapted("llama")
    before = {name: layer.dense_weight().clone() for name, layer in adapter_layers(model).items()}
    fuse_layers(model)
    groups: dict[int, list[str]] = {}
    for name, layer in adapter_layers(model).items():
        assert isinstance(layer, LoraLayer)
        assert torch.equal(layer.dense_weight(), before[name])
        if layer.shared_input is not None:
            groups.setdefault(id(layer.shared_input), []).append(name.rpartition(".")[2])
    assert sorted(map(tuple, groups.values())) == 2 * [("gate_proj", "up_proj")] + 2 * [
        ("q_proj", "k_proj", "v_proj")
    ]


def test_what_cannot_be_prepared_is_an_error() -> None:
    with pytest.raises(UserError, match="compile = true: Linear has no stack of layers"):
        compile_layers(torch.nn.Linear(2, 2))


def test_dropout_leaves_the_fused_operator_out() -> None:
    layers = adapter_layers(adapted("llama", dropout=0.5).train()).values()
    assert not any(isinstance(layer, LoraLayer) and layer.is_plain() for layer in layers)
    assert all(isinstance(layer, LoraLayer) and layer.eval().is_plain() for layer in layers)
