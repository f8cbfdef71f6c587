"""Kernels of our own on a GPU, compared with PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorakit.kernels.fp8 import fp8_linear, quantize_weight
from lorakit.kernels.linear_cross_entropy import IGNORED, LogitTransform, linear_cross_entropy
from lorakit.kernels.lora_linear import lora_linear

pytestmark = pytest.mark.gpu


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(0.3), LogitTransform(2.0, 3.0)]
)
@pytest.mark.parametrize("vocab", [50, 5000, 40_001])
def test_fused_cross_entropy(vocab: int, transform: LogitTransform, label_smoothing: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(37, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, 64, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(vocab, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocab, (37,), device="cuda")
    targets[5:9] = IGNORED
    arguments = (weight, bias, targets, label_smoothing, transform)
    loss = linear_cross_entropy(hidden, *arguments, fused=True)
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    logits = transform(F.linear(exact, weight.double(), bias.double()))
    wanted = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), rel=2e-3)
    assert hidden.grad is not None
    assert exact.grad is not None
    assert relative(hidden.grad, exact.grad) < 2e-2
    assert not hidden.grad[5:9].any()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("outs", [(96,), (64, 32, 16)])
def test_lora_linear(outs: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    x, W = draw(40, 48).requires_grad_(), draw(sum(outs), 48)
    bias = draw(sum(outs)) if with_bias else None
    factors = [(draw(4 + i, 48), draw(out, 4 + i)) for i, out in enumerate(outs)]
    leaves = [x, *(f.requires_grad_() for pair in factors for f in pair)]
    scaling = [0.5 + i for i in range(len(outs))]
    y = torch.cat(lora_linear(x, W, bias, factors, scaling), dim=1)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    pairs = zip(exact[1::2], exact[2::2], scaling, strict=True)
    updates = [s * (exact[0] @ A.t()) @ B.t() for A, B, s in pairs]
    wanted = exact[0] @ W.double().t() + torch.cat(updates, dim=1)
    wanted = wanted if bias is None else wanted + bias.double()
    assert relative(y.detach(), wanted.detach()) < 1e-2
    slope = draw(40, sum(outs))
    y.backward(slope)
    wanted.backward(slope.double())
    for found, reference in zip(leaves, exact, strict=True):
        assert found.grad is not None
        assert reference.grad is not None
        assert relative(found.grad, reference.grad) < 1e-2


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no fp8"
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("outs", [(), (96,), (64, 32, 16)])
def test_fp8_linear(outs: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    out = sum(outs) or 96
    x, W = draw(40, 48).requires_grad_(), draw(out, 48)
    bias = draw(out) if with_bias else None
    factors = [(draw(8, 48), draw(size, 8)) for size in outs]
    leaves = [x, *(f.requires_grad_() for pair in factors for f in pair)]
    scaling = [0.5 + i for i in range(len(outs))]
    y = torch.cat(fp8_linear(x, quantize_weight(W), bias, factors, scaling), dim=1)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = exact[0] @ W.double().t() + (0 if bias is None else bias.double())
    pairs = zip(exact[1::2], exact[2::2], scaling, strict=True)
    updates = [s * (exact[0] @ A.t()) @ B.t() for A, B, s in pairs]
    wanted = wanted + torch.cat(updates, dim=1) if updates else wanted
    assert relative(y.detach(), wanted.detach()) < 5e-2  # e4m3 has three bits of mantissa
    slope = draw(40, out)
    y.backward(slope)
    wanted.backward(slope.double())
    for found, reference in zip(leaves, exact, strict=True):
        assert found.grad is not None
        assert reference.grad is not None
        assert relative(found.grad, reference.grad) < 5e-2
