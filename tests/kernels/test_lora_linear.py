"""Stacked LoRA linears as one operator, compared with the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, library

from lorakit.kernels.lora_linear import lora_linear


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("stacks", [False, True])
@pytest.mark.parametrize("frozen_input", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("outs", [(7,), (6, 3, 2), (6, 5)])
def test_values_and_gradients(
    outs: tuple[int, ...], with_bias: bool, frozen_input: bool, stacks: bool
) -> None:
    x, W = draw(5, 4, seed=0).requires_grad_(not frozen_input), draw(sum(outs), 4, seed=1)
    bias = draw(sum(outs), seed=2) if with_bias else None
    factors = [
        (draw(2 + i, 4, seed=3 + i).requires_grad_(), draw(out, 2 + i, seed=9 + i).requires_grad_())
        for i, out in enumerate(outs)
    ]
    scaling = [0.5 + i for i in range(len(outs))]
    leaves = [*([] if frozen_input else [x]), *(factor for pair in factors for factor in pair)]
    parts = lora_linear(x, W if stacks else W.split(outs), bias, factors, scaling)
    assert [part.shape for part in parts] == [(5, out) for out in outs]
    wanted = torch.nn.functional.linear(x, W, bias) + torch.cat(
        [s * x @ A.t() @ B.t() for (A, B), s in zip(factors, scaling, strict=True)], dim=1
    )
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found, wanted)
    slope = draw(5, sum(outs), seed=20)
    got = torch.autograd.grad(found, leaves, slope)
    for mine, reference in zip(got, torch.autograd.grad(wanted, leaves, slope), strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("rows", [[11], [6, 5]])
@pytest.mark.parametrize("widths", [[11], [6, 5]])
def test_the_operator_is_registered_correctly(widths: list[int], rows: list[int]) -> None:
    arguments = (
        draw(5, 4, seed=0),
        [*draw(11, 4, seed=1).split(rows)],
        None,
        draw(6, 4, seed=2).requires_grad_(),
        draw(11, 6, seed=3).requires_grad_(),
        widths,
    )
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    library.opcheck(torch.ops.lorakit.lora_linear, arguments, test_utils=checks)
