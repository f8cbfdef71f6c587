"""The in-place LoRA product compared with the paper's formula."""

from __future__ import annotations

import pytest
import torch

from lorakit.kernels.low_rank import (
    LowRankDelta,
    RowSlice,
    is_covered_by,
    lora_add_,
)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str
)
def test_value_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(7, 6, dtype=dtype)
    A, B = torch.randn(3, 6, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    y = lora_add_(x @ weight.t(), x, A, B, 0.5)
    # The paper's y + scaling * B A x (LoRA, section 4.1).
    want = x.float() @ weight.float().t() + 0.5 * torch.einsum("or,ri,ni->no", B, A, x.float())
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), want, rtol=tolerance, atol=4 * tolerance)
    got_grads = torch.autograd.grad(y.float().sum(), [x, A, B])
    want_grads = torch.autograd.grad(want.sum(), [x, A, B])
    for got, expected in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=8 * tolerance)


def test_rows_of_the_product() -> None:
    torch.manual_seed(0)
    delta = LowRankDelta(torch.randn(3, 5), torch.randn(8, 3), 0.5)
    rows = torch.empty(4, 5)
    delta.rows_into(rows, 2)
    torch.testing.assert_close(rows, delta.dense()[2:6])


Q, K = RowSlice(0, 2, 4), RowSlice(2, 4, 4)


@pytest.mark.parametrize(
    ("parts", "covered"),
    [
        ([(Q, 1), (K, 2)], True),
        ([(Q, 1)], False),  # columns are left
        ([(Q, 2), (K, 1)], False),  # values outside of the rows
        ([(Q, 1), (K, 3)], False),  # more columns than there are
        ([(Q, 1), (RowSlice(2, 4, 5), 2)], False),  # not a slice of that matrix
    ],
)
def test_the_parts_of_a_fused_update(parts: list[tuple[RowSlice, int]], covered: bool) -> None:
    B = torch.zeros(8, 3)
    for start in (0, 4):
        B[start : start + 2, :1] = 1
        B[start + 2 : start + 4, 1:] = 1
    before = B.clone()
    assert is_covered_by(B, parts) == covered
    assert torch.equal(B, before)
