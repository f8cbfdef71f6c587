"""fp32 master weights under a half-precision model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorakit.models.master_weights import (
    base_dtype,
    plain_name,
    set_value,
    train_module,
    train_parameter,
)
from tests.families import tiny, token_ids


def net(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype).requires_grad_(False)


def trains(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_a_float32_parameter_needs_no_master_weight() -> None:
    model = net(torch.float32)
    before = model[0].bias
    train_parameter(model, "0.bias")
    assert list(trains(model)) == ["0.bias"]
    assert model[0].bias is before
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_sees_its_master_weight_in_the_models_dtype(dtype: torch.dtype) -> None:
    model, plain = net(dtype), net(dtype)
    train_parameter(model, "1.weight")
    ((name, master),) = trains(model).items()
    assert plain_name(name) == "1.weight"
    assert master.dtype == torch.float32
    assert (model[1].weight.dtype, base_dtype(model)) == (dtype, dtype)
    assert isinstance(model[1], nn.Linear)
    x = torch.randn(3, 4, dtype=dtype)
    assert torch.equal(model(x), plain(x))
    model(x).float().square().sum().backward()
    assert master.grad is not None and master.grad.dtype == torch.float32 and master.grad.any()


def test_small_updates_accumulate() -> None:
    model = net()
    train_parameter(model, "0.bias")
    (master,) = trains(model).values()
    with torch.no_grad():
        master.fill_(1.0)
        for _ in range(16):
            master += 2**-9  # below half of bfloat16's step at 1
    assert model[0].bias.unique().item() == 1 + 2**-5
    assert torch.ones(1, dtype=torch.bfloat16) + 2**-9 == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modules_that_share_a_parameter_share_its_master_weight(dtype: torch.dtype) -> None:
    model = tiny("llama", tie_word_embeddings=True).to(dtype).requires_grad_(False)
    before = model(token_ids()).logits
    train_parameter(model, "model.embed_tokens.weight")
    assert len(trains(model)) == 1
    (master,) = trains(model).values()
    assert torch.equal(model(token_ids()).logits, before)
    with torch.no_grad():
        master += 1
    for module in (model.model.embed_tokens, model.lm_head):
        assert torch.equal(module.weight.float(), master.to(dtype).float())
    model(token_ids()).logits.float().sum().backward()
    assert master.grad is not None and master.grad.dtype == torch.float32


def test_values_are_written_to_the_master_weight() -> None:
    model = net()
    train_parameter(model, "0.bias")
    value = torch.full((4,), 1 + 2**-20)
    set_value(model, "0.bias", value)
    set_value(model, "1.bias", value)
    (master,) = trains(model).values()
    assert torch.equal(master, value)
    assert torch.equal(model[0].bias, torch.ones(4, dtype=torch.bfloat16))
    assert torch.equal(model[1].bias, torch.ones(4, dtype=torch.bfloat16))


def test_meta_parameters_are_skipped() -> None:
    with torch.device("meta"):
        model = net()
    set_value(model, "0.bias", torch.ones(4))
    assert model[0].bias.is_meta


def test_a_model_with_master_weights_can_be_copied() -> None:
    model = net()
    train_parameter(model, "0.bias")
    again = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(trains(again).values())).fill_(3)
    assert (again[0].bias == 3).all()
    assert not (model[0].bias == 3).any()


@pytest.mark.parametrize("float32_output", [True, False])
def test_a_fully_trained_module_keeps_the_models_dtype_outside(float32_output: bool) -> None:
    model = net()
    train_module(model, "1", float32_output=float32_output)
    assert {name: p.dtype for name, p in trains(model).items()} == {
        "1.weight": torch.float32,
        "1.bias": torch.float32,
    }
    out = model(torch.randn(2, 4, dtype=torch.bfloat16))
    assert out.dtype == (torch.float32 if float32_output else torch.bfloat16)


def test_other_names_are_unchanged() -> None:
    for name in ("layer.bias", "parametrizations.weight", "a.original"):
        assert plain_name(name) == name
    assert plain_name("a.base_layer.parametrizations.bias.original") == "a.base_layer.bias"
