"""Initializations of LoRA: their formulas, and that the output is unchanged."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.write import save_adapter
from lorakit.base_weight import as_matrix
from lorakit.errors import TargetError
from lorakit.injection import inject, trainable_state
from lorakit.layers import AdapterLayer, adapter_layers
from lorakit.methods.lora import METHOD, LoraConfig
from tests.families import tiny, token_ids

KINDS = ("linear", "conv1d", "embedding")


def module_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made = {"linear": nn.Linear(9, 12), "conv1d": Conv1D(12, 9), "embedding": nn.Embedding(9, 12)}
    return made[kind].requires_grad_(False)


def wrapped(kind: str, init: str, r: int = 4, **keys: float) -> AdapterLayer:
    return METHOD.wrap(module_of(kind), LoraConfig(r=r, init=init, **keys), "layer")


def inputs(kind: str) -> torch.Tensor:
    return torch.arange(9) if kind == "embedding" else torch.randn(5, 9)


@pytest.mark.parametrize("init", ["default", "b_gaussian", "pissa", "orthogonal"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_starts_unchanged_and_training_moves_it(kind: str, init: str) -> None:
    layer, x = wrapped(kind, init), inputs(kind)
    weight = module_of(kind).weight
    torch.testing.assert_close(layer(x), layer.base_layer(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.fold(layer.weight), weight, atol=1e-5, rtol=1e-5)
    # The first gradient is zero if the other factor is zero, so both change after two steps.
    for _ in range(2):
        layer.zero_grad()
        layer(x).square().sum().backward()
        torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1).step()
    assert (layer(x) - layer.base_layer(x)).abs().max() > 1e-3
    assert torch.equal(layer.weight, weight), "W keeps its bits"


@pytest.mark.parametrize("kind", KINDS)
def test_pissa_is_the_principal_part_of_w(kind: str) -> None:
    layer = wrapped(kind, "pissa", r=3, lora_alpha=5)
    U, S, Vt = torch.linalg.svd(layer.dense_weight())
    update = layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(update, U[:, :3] * S[:3] @ Vt[:3], atol=1e-5, rtol=1e-4)
    norms = (S[:3] / layer.scaling).sqrt()
    torch.testing.assert_close(layer.lora_A.norm(dim=1), norms, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.lora_B.norm(dim=0), norms, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pissa_starts_where_pefts_does(family: str) -> None:
    """Equal up to the sign of each pair of singular vectors; PEFT's residual is our W minus the
    initial product."""
    ends = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[family]
    model = tiny(family)
    inject(model, LoraConfig(r=3, lora_alpha=5, target_modules=ends, init="pissa"))
    theirs = get_peft_model(
        tiny(family), PeftLora(r=3, lora_alpha=5, target_modules=ends, init_lora_weights="pissa")
    ).base_model.model
    for name, layer in adapter_layers(model).items():
        other = theirs.get_submodule(name)
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        sign = (layer.lora_A * A).sum(1).sign()
        torch.testing.assert_close(layer.lora_A, sign[:, None] * A, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.lora_B, sign * B, atol=1e-5, rtol=1e-4)
        residual = layer.weight - as_matrix(
            layer.base_layer, _without_start(layer).delta_weight().detach()
        )
        torch.testing.assert_close(other.base_layer.weight, residual, atol=1e-5, rtol=1e-4)


def _without_start(layer: AdapterLayer) -> AdapterLayer:
    plain = copy.deepcopy(layer)
    plain.initial_A = plain.initial_B = None
    return plain


def test_pissa_of_a_large_matrix_finds_its_principal_part_too() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(1100, 1050, bias=False).requires_grad_(False)
    strong = torch.randn(1050, 4) @ torch.randn(4, 1100)
    linear.weight.copy_(strong + 0.01 * torch.randn(1050, 1100))
    layer = METHOD.wrap(linear, LoraConfig(r=4, init="pissa"), "layer")
    update = layer.scaling * layer.lora_B @ layer.lora_A
    assert (update - strong).norm() / strong.norm() < 0.01
    x = torch.randn(3, 1100)
    torch.testing.assert_close(layer(x), linear(x), atol=1e-3, rtol=1e-3)


def test_pissa_takes_no_more_ranks_than_w_has() -> None:
    wrapped("linear", "pissa", r=9)
    with pytest.raises(TargetError, match=r"r = 10: init: pissa on layer; allowed: up to 9"):
        wrapped("linear", "pissa", r=10)


def test_pissa_is_saved_with_its_start_as_one_lora_of_twice_the_rank(tmp_path: Path) -> None:
    model, config = tiny("llama"), LoraConfig(r=3, init="pissa", rank_pattern={"v_proj": 2})
    inject(model, config)
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        want = model(token_ids()).logits
    save_adapter(tmp_path, model, config, base_model_name_or_path="b", task_type="CAUSAL_LM")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(settings["rank_pattern"].values()) == {6, 4}
    assert settings.get("init_lora_weights", True) is True, "a reader leaves its base as it is"
    again = tiny("llama")
    load_adapter(again, tmp_path)
    assert {layer.r for layer in adapter_layers(again).values()} == {6, 4}
    with torch.no_grad():
        torch.testing.assert_close(again(token_ids()).logits, want, atol=1e-5, rtol=0)


def test_pissas_start_is_resumed_and_not_computed_again() -> None:
    config = LoraConfig(r=3, init="pissa")
    model, other = tiny("llama"), tiny("llama")
    for one in (model, other):
        inject(one, config)
    with torch.no_grad():
        for layer in adapter_layers(other).values():  # as on another machine, whose SVD may differ
            for factor in (layer.initial_A, layer.initial_B):
                factor.neg_().mul_(1 + 1e-6)
    hooks = [METHOD.hooks(adapter_layers(one), config, 10) for one in (model, other)]
    assert hooks[0].state()
    hooks[1].load_state(hooks[0].state())
    with torch.no_grad():
        for name, parameter in trainable_state(other).items():
            parameter.copy_(model.get_parameter(name))
        assert torch.equal(model(token_ids()).logits, other(token_ids()).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_orthogonal_factors_cancel_and_neither_is_zero(kind: str) -> None:
    layer = wrapped(kind, "orthogonal", r=6)
    assert (layer.lora_B @ layer.lora_A).abs().max() < 1e-6
    for factor in (layer.lora_A, layer.lora_B):
        assert torch.linalg.matrix_rank(factor) == 3, "half of the directions each"
        assert 0.02 < factor.std() < 0.2


@pytest.mark.parametrize("keys", [{"r": 5}, {"r": 4, "rank_pattern": {"v_proj": 3}}], ids=str)
def test_orthogonal_needs_even_ranks(keys: dict[str, int]) -> None:
    model = tiny("llama")
    with pytest.raises(TargetError, match=r"r = [53]: init: orthogonal on .*allowed: even ranks"):
        inject(model, LoraConfig(init="orthogonal", **keys))
    assert not adapter_layers(model)
    assert all(p.requires_grad for p in model.parameters()), "the model is as it was"


def test_b_gaussian_keeps_the_size_of_h() -> None:
    layer = METHOD.wrap(nn.Linear(8, 4000), LoraConfig(r=16, init="b_gaussian"), "layer")
    assert not layer.lora_A.any()
    assert abs(layer.lora_B.std().item() * 4 - 1) < 0.02
