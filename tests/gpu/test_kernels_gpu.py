"""Kernels of our own on a GPU, compared with PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lorakit.kernels.fp8 import fp8_linear, quantize_weight
from lorakit.kernels.linear_cross_entropy import IGNORED, LogitTransform, linear_cross_entropy
from lorakit.kernels.lora_linear import lora_linear
from lorakit.models.fast_norms import FastRmsNorm
from lorakit.models.fast_rotary import use_fast_rotary, with_kernel
from tests import families
from tests.gpu.products import Factors, assert_close_to_formula, draw, draw_factors, relative

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(0.3), LogitTransform(2.0, 3.0)]
)
@pytest.mark.parametrize("vocab", [50, 5000, 40_001])
@pytest.mark.parametrize("weighted", [False, True])
def test_fused_cross_entropy(
    weighted: bool, vocab: int, transform: LogitTransform, label_smoothing: float
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(37, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, 64, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(vocab, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocab, (37,), device="cuda")
    targets[5:9] = IGNORED
    arguments = (weight, bias, targets, label_smoothing, transform)
    row_weights = torch.rand(37, device="cuda") * 3 if weighted else torch.ones(37, device="cuda")
    given = row_weights if weighted else None
    loss = linear_cross_entropy(hidden, *arguments, fused=True, row_weights=given)
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    logits = transform(F.linear(exact, weight.double(), bias.double()))
    each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    wanted = (each * row_weights).sum()
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), rel=2e-3)
    assert hidden.grad is not None
    assert exact.grad is not None
    assert relative(hidden.grad, exact.grad) < 2e-2
    assert not hidden.grad[5:9].any()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("outs", [(96,), (64, 32, 16), (64, 56)])
def test_lora_linear(outs: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    W, bias = draw(sum(outs), 48), draw(sum(outs)) if with_bias else None
    factors = draw_factors(outs, 48, [4 + i for i in range(len(outs))])

    def product(x: Tensor, factors: Factors, scaling: list[float]) -> Tensor:
        return torch.cat(lora_linear(x, W, bias, factors, scaling), dim=1)

    assert_close_to_formula(product, W, bias, factors, 1e-2)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no fp8"
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("outs", [(), (96,), (64, 32, 16)])
def test_fp8_linear(outs: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    out = sum(outs) or 96
    W, bias = draw(out, 48), draw(out) if with_bias else None

    def product(x: Tensor, factors: Factors, scaling: list[float]) -> Tensor:
        return torch.cat(fp8_linear(x, quantize_weight(W), bias, factors, scaling), dim=1)

    # e4m3 has three bits of mantissa.
    assert_close_to_formula(product, W, bias, draw_factors(outs, 48, [8] * len(outs)), 5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 576, 4096])
def test_rms_norm(size: int, dtype: torch.dtype) -> None:
    """As transformers', but for sums in another order, and as close to float64 as that."""
    torch.manual_seed(0)
    weight = nn.Parameter(draw(size).to(dtype) + 1, requires_grad=False)
    plain = LlamaRMSNorm(size, eps=1e-5)
    plain.weight = weight
    x, dy = draw(7, 33, size).to(dtype), draw(7, 33, size).to(dtype)

    def with_gradient(norm: nn.Module) -> tuple[Tensor, Tensor]:
        own = x.clone().requires_grad_()
        y = norm(own)
        y.backward(dy)
        assert own.grad is not None
        return y.detach(), own.grad

    (y, dx), (expected_y, expected_dx) = map(with_gradient, (FastRmsNorm(weight, 1e-5), plain))
    assert (y != expected_y).double().mean() < 0.01
    torch.testing.assert_close(y, expected_y, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    own = x.double().requires_grad_()
    exact = weight.double() * own / (own.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    [exact_dx] = torch.autograd.grad(exact, own, dy.double())
    assert relative(dx.double(), exact_dx) <= 1.05 * relative(expected_dx.double(), exact_dx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "heads", "key_heads", "head_dim", "batch"),
    [(2, 9, 3, 64, 1), (3, 4, 4, 48, 3), (1, 64, 8, 128, 1)],
)
def test_rotary_equals_the_operators(
    rows: int, heads: int, key_heads: int, head_dim: int, batch: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tokens, sizes = 37, [heads * head_dim, key_heads * head_dim]
    q_and_k = draw(rows, tokens, sum(sizes)).to(dtype).requires_grad_()
    cos, sin = (draw(batch, tokens, head_dim).to(dtype) for _ in range(2))
    dq = draw(rows, heads, tokens, head_dim).to(dtype)
    dk = draw(rows, tokens, key_heads, head_dim).to(dtype).transpose(1, 2)
    results = []
    for apply in (apply_rotary_pos_emb, with_kernel(apply_rotary_pos_emb)):
        q, k = (
            part.view(rows, tokens, -1, head_dim).transpose(1, 2)
            for part in q_and_k.split(sizes, dim=-1)
        )
        rotated = apply(q, k, cos, sin)
        results.append((*rotated, *torch.autograd.grad(rotated, q_and_k, (dq, dk))))
    assert all(map(torch.equal, *results))


def test_factors_that_the_kernel_does_not_take() -> None:
    """One token's factors for all tokens, as transformers' operators broadcast them."""
    q, k = draw(2, 4, 7, 16).bfloat16(), draw(2, 2, 7, 16).bfloat16()
    cos, sin = (draw(1, 1, 16).bfloat16() for _ in range(2))
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    assert all(map(torch.equal, with_kernel(apply_rotary_pos_emb)(q, k, cos, sin), expected))


def test_a_model_with_fast_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", original)  # restored afterwards
    model: Any = families.randomized(families.tiny("llama")).to("cuda", torch.bfloat16)
    input_ids = families.token_ids().to("cuda")
    before = model(input_ids=input_ids).logits
    use_fast_rotary(model)
    replaced = modeling_llama.apply_rotary_pos_emb
    assert replaced is not original
    assert torch.equal(model(input_ids=input_ids).logits, before)
    use_fast_rotary(model)
    assert modeling_llama.apply_rotary_pos_emb is replaced
