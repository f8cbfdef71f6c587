"""Batched low-rank products: those of each adapter by itself."""

from __future__ import annotations

import pytest
import torch

from lorakit.kernels.joint_low_rank import Run, joint_lora_add_
from lorakit.kernels.low_rank import lora_add_

RANKS = (3, 3, 2, 0, 2)  # the fourth adapter has no update
IN, OUT, ROWS = 6, 5, 7


@pytest.mark.parametrize("scaling", [(2.0,) * 5, (2.0, 0.5, 1.0, 0.0, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_each_adapter(
    dtype: torch.dtype, scaling: tuple[float, ...]
) -> None:
    torch.manual_seed(0)
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    A = [torch.randn(r, IN, dtype=factor, requires_grad=True) for r in RANKS]
    B = [torch.randn(OUT, r, dtype=factor, requires_grad=True) for r in RANKS]
    x = torch.randn(5, ROWS, IN, dtype=dtype, requires_grad=True)
    W = torch.randn(OUT, IN, dtype=dtype)
    upstream = torch.randn(5, ROWS, OUT, dtype=dtype)
    wanted = [
        lora_add_(x[k] @ W.t(), x[k], A[k], B[k], scaling[k]) if r else x[k] @ W.t()
        for k, r in enumerate(RANKS)
    ]
    leaves = [x, *(a for a in A if len(a)), *(b for b in B if b.shape[1])]
    expected = torch.autograd.grad((torch.stack(wanted) * upstream).sum(), leaves)

    spans = [(0, 2), (2, 3), (4, 5)]
    runs = [Run(a, b, _scaling(scaling[a:b], dtype)) for a, b in spans]
    factors = [(torch.stack(A[a:b]), torch.stack(B[a:b])) for a, b in spans]
    y = joint_lora_add_(x @ W.t(), x, runs, factors)
    found = torch.autograd.grad((y * upstream).sum(), leaves)
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(y, torch.stack(wanted), rtol=rtol, atol=rtol)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * 10)


def _scaling(values: tuple[float, ...], dtype: torch.dtype) -> float | torch.Tensor:
    if len({*values}) == 1:
        return values[0]
    return torch.tensor(values, dtype=dtype).view(-1, 1, 1)
