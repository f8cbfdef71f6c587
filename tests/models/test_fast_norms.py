"""RMSNorm: equal to the bit, with gradients as close to float64 as transformers'."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorakit.models.fast_norms import FastRmsNorm, use_fast_norms
from tests import families

HALF = [torch.bfloat16, torch.float16]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3"]


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_stay_the_same(family: str, dtype: torch.dtype) -> None:
    model = families.randomized(families.tiny(family)).to(dtype).requires_grad_(False)
    before, keys, found = families.logits(model), list(model.state_dict()), len(norms(model))
    replaced = use_fast_norms(model)
    assert torch.equal(families.logits(model), before)
    assert list(model.state_dict()) == keys
    # Gemma's multiply by 1 + w, in float32.
    assert replaced == (0 if family.startswith("gemma") else found)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_gradients_are_as_close_to_float64(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = LlamaRMSNorm(96, eps=1e-5)
    nn.init.normal_(plain.weight, mean=1.0, std=0.3, generator=generator)
    plain = plain.to(dtype).requires_grad_(False)
    x = torch.randn(4, 17, 96, generator=generator).mul_(scale).to(dtype)
    dy = torch.randn(4, 17, 96, generator=generator).to(dtype)
    fast = FastRmsNorm(plain.weight, plain.variance_epsilon)
    expected = gradient(lambda x: in_float64(x, plain), x.double(), dy.double())
    before, after = (
        float((gradient(norm, x, dy).double() - expected).norm()) for norm in (plain, fast)
    )
    assert after <= 1.01 * before
    assert after < 5e-3 * float(expected.norm())


def gradient(norm: object, x: Tensor, dy: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    assert callable(norm)
    norm(x).backward(dy)
    assert x.grad is not None
    return x.grad


def in_float64(x: Tensor, norm: LlamaRMSNorm) -> Tensor:
    mean = (x * x).mean(-1, keepdim=True)
    return norm.weight.double() * x / (mean + norm.variance_epsilon).sqrt()


def test_trained_norms_are_kept() -> None:
    model = families.tiny("llama").to(torch.bfloat16).requires_grad_(False)
    first = norms(model)[0].requires_grad_(True)
    assert use_fast_norms(model) == 4
    assert norms(model)[0] is first


def test_float32_models_are_kept() -> None:
    model = families.tiny("llama").requires_grad_(False)
    assert use_fast_norms(model) == 0


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        y: Tensor = super().forward(hidden_states)
        return y if gate is None else y * gate


def test_norms_with_a_second_argument_are_kept() -> None:
    model = families.tiny("llama").to(torch.bfloat16)
    model.set_submodule("model.norm", GatedRMSNorm(model.config.hidden_size).to(torch.bfloat16))
    model.requires_grad_(False)
    assert use_fast_norms(model) == 4
    assert isinstance(model.get_submodule("model.norm"), GatedRMSNorm)


def test_residuals_in_float32() -> None:
    """As Mamba has by default, in models of half precision."""
    plain = LlamaRMSNorm(96).to(torch.bfloat16).requires_grad_(False)
    fast = FastRmsNorm(plain.weight, plain.variance_epsilon)
    x, dy = torch.randn(2, 5, 96), torch.randn(2, 5, 96)
    before = x.clone()
    assert torch.equal(fast(x), plain(x))
    assert torch.equal(x, before)
    assert torch.equal(gradient(fast, x, dy), gradient(plain, x, dy))
