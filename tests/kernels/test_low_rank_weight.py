"""Products with W + left right that make no sum, compared with those of the sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernels.low_rank_weight import LowRankWeight

E, M, N, R, S = 3, 8, 12, 4, 10
OFFSETS = torch.tensor([4, 4, 10], dtype=torch.int32)

#: f(x, W) for x (S, M) and W (E, M, N).
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "an expert": lambda x, W: x @ W[1],
    "an expert by a tensor": lambda x, W: x @ W[torch.tensor(2)],
    "linear": lambda x, W: F.linear(x, W.transpose(-2, -1)[0]),
    "linear with a bias": lambda x, W: F.linear(x, W.transpose(1, 2)[0], x.sum() * torch.ones(N)),
    "groups": lambda x, W: F.grouped_mm(x, W, offs=OFFSETS),
    "batches": lambda x, W: torch.bmm(x.expand(E, S, M), W),
    "a weight for each row": lambda x, W: torch.bmm(
        W.transpose(-2, -1)[torch.arange(S) % E], x.unsqueeze(-1)
    ),
    "the sum": lambda x, W: torch.einsum("sm,emn->esn", x, W),
    "the sum of a part": lambda x, W: x[:, :2] @ W[:, :2],
    "facts": lambda x, W: x.new_ones(W.shape) * W.size(1) * len(W) * x.sum(),
}
NO_SUM = [name for name in PRODUCTS if not name.startswith("the sum")]


def pair() -> tuple[Tensor, LowRankWeight, list[Tensor]]:
    """x, a weight, and the leaves that get gradients."""
    torch.manual_seed(0)
    x, left, right = (
        torch.randn(*shape, requires_grad=True) for shape in ((S, M), (E, M, R), (E, R, N))
    )
    return x, LowRankWeight.of(torch.randn(E, M, N), left, right), [x, left, right]


@pytest.mark.parametrize("name", PRODUCTS)
def test_outputs_and_gradients_are_those_of_the_sum(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, leaves = pair()
    want = PRODUCTS[name](x, weight.dense())
    gradients = torch.autograd.grad(want.square().sum(), leaves, allow_unused=True)
    if name in NO_SUM:
        monkeypatch.delattr(LowRankWeight, "dense")
    found = PRODUCTS[name](x, weight)
    assert type(found) is Tensor
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-5)
    own = torch.autograd.grad(found.square().sum(), leaves, allow_unused=True)
    for mine, other in zip(own, gradients, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-4)


def test_a_right_factor_of_zeros_changes_no_bit() -> None:
    x, weight, _ = pair()
    weight.right = torch.zeros_like(weight.right)
    found = F.grouped_mm(x, weight, offs=OFFSETS)
    assert found.equal(F.grouped_mm(x, weight.plain(), offs=OFFSETS))
