"""The in-place LoRA product against the paper's words."""

from __future__ import annotations

import pytest
import torch

from lorakit.kernels.low_rank import lora_add_, lora_add_reference


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str
)
def test_value_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(7, 6, dtype=dtype)
    A, B = torch.randn(3, 6, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    y = lora_add_(x @ weight.t(), x, A, B, 0.5)
    want = lora_add_reference(x.float() @ weight.float().t(), x.float(), A, B, 0.5)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), want, rtol=tolerance, atol=4 * tolerance)
    got_grads = torch.autograd.grad(y.float().sum(), [x, A, B])
    want_grads = torch.autograd.grad(want.sum(), [x, A, B])
    for got, expected in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=8 * tolerance)
