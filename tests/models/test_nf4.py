"""Linear layers in 4-bit NormalFloat: which are quantized, and what the layer computes."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lorakit.errors import UserError
from lorakit.models.nf4 import can_quantize, check_support, quantize_linear


def linear(*sizes: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*sizes, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_computes_with_its_dequantized_weight(bias: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    dense = linear(192, 136, bias=bias, dtype=dtype)
    layer = quantize_linear(dense, torch.device("cpu"))
    assert (layer.in_features, layer.out_features) == (192, 136)
    assert not list(layer.parameters())
    assert not layer.state_dict()
    assert layer.weight.dtype == dtype
    assert 0 < (layer.weight - dense.weight).abs().max() < 0.2 * dense.weight.abs().max()
    dense.weight.copy_(layer.weight)
    x = torch.randn(2, 3, 192, dtype=dtype)
    torch.testing.assert_close(layer(x), dense(x))


def test_what_is_quantized() -> None:
    assert can_quantize(linear(128, 128))
    assert not can_quantize(linear(128, 127)), "small"
    assert not can_quantize(linear(160, 128)), "rows are not whole blocks"
    assert not can_quantize(nn.Linear(128, 128)), "trained"
    trained_bias = linear(128, 128)
    trained_bias.bias.requires_grad_()
    assert not can_quantize(trained_bias)
    assert not can_quantize(nn.Embedding(128, 128).requires_grad_(False))


def test_bitsandbytes_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(
        UserError, match=r'base_precision = "nf4": needs bitsandbytes \(pip.*gpu.*: fp8, null$'
    ):
        check_support()
