"""Weights in 4-bit NormalFloat, compared with bitsandbytes' own layer and with dense products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from lorakit.kernels.nf4 import Nf4Weight, dense, nf4_linear, quantize_weight, stacked

bitsandbytes = pytest.importorskip("bitsandbytes")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(136, 192), (512, 128), (1, 64)])
def test_the_weight_is_that_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = draw(*shape, dtype=dtype)
    reference = bitsandbytes.nn.Linear4bit(
        shape[1], shape[0], bias=False, compress_statistics=True, quant_type="nf4"
    )
    reference.weight = bitsandbytes.nn.Params4bit(
        W.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    reference = reference.to("cpu")  # which quantizes
    wanted = bitsandbytes.functional.dequantize_4bit(
        reference.weight.data, reference.weight.quant_state
    )
    found = quantize_weight(W)
    assert torch.equal(found.packed.flatten(), reference.weight.data.flatten())
    assert torch.equal(found.dense(dtype), wanted)
    assert found.dense(dtype).dtype == dtype


def test_memory_is_about_half_a_byte_per_value() -> None:
    found = quantize_weight(draw(2048, 2048))
    assert sum(tensor.nbytes for tensor in found) < 0.517 * 2048 * 2048


def test_stacked_weights_keep_their_own_statistics() -> None:
    """The scales of 256 blocks would span two of these weights."""
    weights = [quantize_weight(draw(out, 64, seed=out) * out) for out in (130, 7, 300)]
    assert torch.equal(
        dense(stacked(weights), torch.float32),
        torch.cat([weight.dense(torch.float32) for weight in weights]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradient_are_those_of_the_dense_weight(
    with_bias: bool, dtype: torch.dtype
) -> None:
    weight = quantize_weight(draw(136, 192, dtype=dtype))
    bias = draw(136, dtype=dtype, seed=1) if with_bias else None
    x = draw(5, 192, dtype=dtype, seed=2).requires_grad_()
    slope = draw(5, 136, dtype=dtype, seed=3)
    found, wanted = nf4_linear(x, weight, bias), F.linear(x, weight.dense(dtype), bias)
    torch.testing.assert_close(found, wanted)
    [mine] = torch.autograd.grad(found, x, slope)
    [reference] = torch.autograd.grad(wanted, x, slope)
    torch.testing.assert_close(mine, reference)


def test_the_gradient_against_differences() -> None:
    """y is linear in x, so that differences are exact up to rounding, in float64."""
    weight = Nf4Weight(*quantize_weight(draw(8, 64)))
    W = weight.dense(torch.float32).double()
    x, slope = draw(3, 64, seed=1).requires_grad_(), draw(3, 8, seed=2)
    [found] = torch.autograd.grad(nf4_linear(x, weight, None), x, slope)
    torch.testing.assert_close(found.double(), slope.double() @ W, rtol=1e-5, atol=1e-5)


def test_nothing_of_the_dense_size_is_saved() -> None:
    weight = quantize_weight(draw(512, 512))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = draw(3, 512).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nf4_linear(x, weight, None).sum().backward()
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in weight}


def test_the_operator_is_registered_correctly() -> None:
    x, weight = draw(3, 64).requires_grad_(), list(quantize_weight(draw(8, 64)))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    operator = torch.ops.lorakit.nf4_linear
    library.opcheck(operator, (x, weight, draw(8), False), test_utils=checks)
    library.opcheck(operator, (draw(3, 8).requires_grad_(), weight, None, True), test_utils=checks)
