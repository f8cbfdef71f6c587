"""Batched low-rank products: those of each adapter by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorakit.kernels.joint_low_rank import joint_lora_add_, joint_lora_linear
from lorakit.kernels.low_rank import lora_add_

RANKS = (3, 3, 2, 0, 2)  # the fourth adapter has no update
SCALING = (2.0, 0.5, 1.0, 0.0, 3.0)
RUNS = [slice(0, 2), slice(2, 3), slice(4, 5)]
IN, OUT, ROWS = 6, 5, 7


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_each_adapter(
    dtype: torch.dtype, fused: bool, needs_dx: bool
) -> None:
    torch.manual_seed(0)
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    A = [torch.randn(r, IN, dtype=factor, requires_grad=True) for r in RANKS]
    B = [torch.randn(OUT, r, dtype=factor, requires_grad=True) for r in RANKS]
    x = torch.randn(5, ROWS, IN, dtype=dtype, requires_grad=needs_dx)
    W, bias = torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)
    upstream = torch.randn(5, ROWS, OUT, dtype=dtype)
    wanted = [
        lora_add_(F.linear(x[k], W, bias), x[k], A[k], B[k], SCALING[k])
        if r
        else F.linear(x[k], W, bias)
        for k, r in enumerate(RANKS)
    ]
    inputs = [x] if needs_dx else []
    leaves = [*inputs, *(a for a in A if len(a)), *(b for b in B if b.shape[1])]
    expected = torch.autograd.grad((torch.stack(wanted) * upstream).sum(), leaves)

    scaling = torch.tensor(SCALING, dtype=factor).view(-1, 1, 1)
    factors = [(torch.stack(A[run]) * scaling[run], torch.stack(B[run])) for run in RUNS]
    if fused:
        y = joint_lora_linear(x, W, bias, RUNS, factors)
    else:
        y = joint_lora_add_(F.linear(x.flatten(0, 1), W, bias), x, RUNS, factors)
    found = torch.autograd.grad((y.view_as(upstream) * upstream).sum(), leaves)
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(y.view_as(upstream), torch.stack(wanted), rtol=rtol, atol=rtol)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * 10)
