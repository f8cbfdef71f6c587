"""The LoRA layer compared with the paper's formula in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.peft.lora import from_peft
from lorakit.errors import AdapterError
from lorakit.layers import AdapterLayer
from lorakit.methods.lora import METHOD, LoraConfig


def _filled(module: nn.Module, **config: Any) -> AdapterLayer:
    """Return a layer with two random factors."""
    layer = METHOD.wrap(module, LoraConfig(**config), "layer")
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    return layer


def _numpy(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_linear_is_the_formula(use_rslora: bool) -> None:
    layer = _filled(nn.Linear(6, 10), r=3, lora_alpha=5, use_rslora=use_rslora)
    x = torch.randn(2, 4, 6)
    W, b, A, B, x_ = _numpy(layer.weight, layer.bias, layer.lora_A, layer.lora_B, x)
    scaling = 5 / math.sqrt(3) if use_rslora else 5 / 3
    want = x_ @ W.T + b + scaling * (x_ @ A.T @ B.T)
    np.testing.assert_allclose(layer(x).detach().numpy(), want, atol=1e-5)


def test_conv1d_is_the_formula_with_the_weight_transposed() -> None:
    layer = _filled(Conv1D(10, 6), r=2)
    x = torch.randn(3, 6)
    W, b, A, B, x_ = _numpy(layer.weight, layer.bias, layer.lora_A, layer.lora_B, x)
    assert W.shape == (6, 10)
    np.testing.assert_allclose(
        layer(x).detach().numpy(), x_ @ W + b + 8 * x_ @ A.T @ B.T, atol=1e-4
    )


@pytest.mark.parametrize("embed_scale", [None, 3.0])
def test_embedding_adds_a_row_of_the_product(embed_scale: float | None) -> None:
    embedding: nn.Embedding = nn.Embedding(12, 5)
    if embed_scale is not None:  # as in Gemma, which scales the rows
        from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

        embedding = Gemma3TextScaledWordEmbedding(12, 5, 0, embed_scale=embed_scale)
    layer = _filled(embedding, r=2, lora_alpha=6)
    ids = torch.tensor([[1, 11, 3], [0, 1, 1]])
    W, A, B = _numpy(layer.weight, layer.lora_A, layer.lora_B)
    want = (W + 3 * (B @ A).T)[ids.numpy()] * (embed_scale or 1)
    np.testing.assert_allclose(layer(ids).detach().numpy(), want, atol=1e-4)


@pytest.mark.parametrize("module", [nn.Linear(6, 10), Conv1D(10, 6), nn.Embedding(10, 6)])
def test_the_gradients_equal_autograds(module: nn.Module) -> None:
    """The in-place product compared with the reference's einsum."""
    layer = _filled(module.requires_grad_(False), r=3)
    embedding = layer.kind == "embedding"
    x = torch.randint(10, (7,)) if embedding else torch.randn(7, 6, requires_grad=True)
    out = layer(x)
    out.square().sum().backward()
    got = [layer.lora_A.grad.clone(), layer.lora_B.grad.clone()]
    got += [] if embedding else [x.grad.clone()]
    inputs = [layer.lora_A, layer.lora_B] + ([] if embedding else [x])
    delta = layer.scaling * torch.einsum("or,ri->oi", layer.lora_B, layer.lora_A)
    rows = delta.t()[x] if embedding else x @ delta.t()
    want = torch.autograd.grad((layer.base_layer(x) + rows).square().sum(), inputs)
    for mine, reference in zip(got, want, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-3, rtol=1e-4)


def test_dropout_is_on_the_adapter_path_only() -> None:
    layer = _filled(nn.Linear(6, 10), r=3, lora_dropout=0.5)
    x = torch.randn(64, 6)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), layer(x))
        clean, torch_state = layer(x), torch.random.get_rng_state()
        got = layer.train()(x)
        torch.random.set_rng_state(torch_state)
        dropped = nn.functional.dropout(x, 0.5)
        want = layer.base_layer(x) + layer.scaling * dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, clean, atol=1e-2)


@pytest.mark.parametrize(("init", "zero"), [("default", "lora_B"), ("b_gaussian", "lora_A")])
def test_one_factor_is_zero_and_the_other_random(init: str, zero: str) -> None:
    layer = METHOD.wrap(nn.Linear(64, 48), LoraConfig(r=16, init=init), "layer")
    factors = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    assert not factors.pop(zero).any()
    (random,) = factors.values()
    assert random.std() > 0.01
    # Kaiming-uniform with a = sqrt(5): uniform within 1 / sqrt(in_features).
    if init == "default":
        assert 0.9 / 8 < random.abs().max() <= 1 / 8


def test_the_longest_suffix_decides_r_and_alpha() -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, rank_pattern={"q": 2, "0.q": 6}, alpha_pattern={"layers.1.q": 3}
    )
    assert [config.rank_of(f"layers.{i}.q") for i in (0, 1)] == [6, 2]
    assert config.rank_of("layers.0.qq") == 4
    assert config.scaling_of("layers.1.q") == 3 / 2
    assert config.scaling_of("layers.0.q") == 8 / 6


def test_factors_are_float32_over_a_bfloat16_base_and_the_output_is_bfloat16() -> None:
    layer = _filled(nn.Linear(6, 10, dtype=torch.bfloat16))
    assert (layer.lora_A.dtype, layer.lora_B.dtype) == (torch.float32, torch.float32)
    out = layer(torch.randn(2, 6, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_A.weight": (3, 6)}, "missing tensors: layer.lora_B.weight"),
        (
            {"lora_A.weight": (3, 6), "lora_B.weight": (10, 3), "lora_C.weight": (1, 1)},
            "unknown tensors: layer.lora_C.weight",
        ),
        (
            {"lora_A.weight": (4, 6), "lora_B.weight": (10, 4)},
            r"is \(4, 6\).* r = 3 needs \(3, 6\)",
        ),
        ({"lora_A.weight": (3, 6), "lora_B.weight": (11, 3)}, r"is \(11, 3\).* needs \(10, 3\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    values = {name: torch.zeros(shape) for name, shape in tensors.items()}
    with pytest.raises(AdapterError, match=message):
        from_peft(METHOD, nn.Linear(6, 10), "layer", {"r": 3}, values)
