"""Kernels of our own on a GPU, compared with PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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
    assert relative(hidden.grad, exact.grad) < 1e-2
    assert not hidden.grad[5:9].any()


@pytest.mark.parametrize("with_bias", [False, True])
def test_lora_linear(with_bias: bool) -> None:
    torch.manual_seed(0)
    shapes = {"x": (40, 64), "W": (96, 64), "A": (8, 64), "B": (96, 8)}
    exact = {n: torch.randn(s, device="cuda", dtype=torch.float64) for n, s in shapes.items()}
    half = {n: t.bfloat16() for n, t in exact.items()}
    exact = {n: t.double() for n, t in half.items()}
    for name in ("x", "A", "B"):
        exact[name].requires_grad_()
        half[name].requires_grad_()
    bias = torch.randn(96, device="cuda", dtype=torch.bfloat16) if with_bias else None
    y = lora_linear(half["x"], half["W"], bias, half["A"], half["B"], 0.5)
    wanted = exact["x"] @ exact["W"].t() + 0.5 * (exact["x"] @ exact["A"].t()) @ exact["B"].t()
    wanted = wanted if bias is None else wanted + bias.double()
    assert relative(y.detach(), wanted.detach()) < 1e-2
    slope = torch.randn(40, 96, device="cuda", dtype=torch.bfloat16)
    y.backward(slope)
    wanted.backward(slope.double())
    for name in ("x", "A", "B"):
        assert relative(half[name].grad, exact[name].grad) < 1e-2, name
