"""What operators need on a GPU that their results on ``meta`` do not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lorakit.planning.attention import (
    attention_backward_flops,
    attention_flops,
    attention_temporary,
)
from lorakit.planning.tracker import Flops, Temporary


def _dense_bytes(weight: Sequence[Tensor], size: int) -> int:
    """The bytes of a weight in nf4 that is dequantized within the operator, with ``size`` bytes a
    value, and of its absmax in float32, one for each 64 values; 0 for dense weights."""
    if weight[0].is_floating_point():
        return 0
    values = 2 * weight[0].numel()
    return values * size + 4 * values // 64


def _linear(x: Tensor, weight: list[Tensor], *_: Any) -> int:
    return _dense_bytes(weight, x.element_size())


def _lora_linear_backward(dys: list[Tensor], h: Tensor, weight: list[Tensor], *_: Any) -> int:
    return _dense_bytes(weight, h.element_size())


TEMPORARIES: dict[str, Temporary] = {
    "lorakit.planned_attention_backward": attention_temporary,
    "lorakit.nf4_linear": _linear,
    "lorakit.lora_linear": _linear,
    "lorakit.lora_linear_backward": _lora_linear_backward,
}


def _elements(weight: list[Tensor]) -> int:
    """The elements of W (out, in), which may be in parts."""
    if weight[0].is_floating_point():
        return sum(W.numel() for W in weight)
    return 2 * weight[0].numel()


def _nf4_linear_flops(x: Tensor, weight: list[Tensor], *_: Any, **__: Any) -> int:
    return 2 * len(x) * _elements(weight)


def _lora_linear_flops(
    x: Tensor, weight: list[Tensor], bias: Any, A: Tensor, B: Tensor, *_: Any, **__: Any
) -> int:
    return 2 * len(x) * (_elements(weight) + A.numel() + B.numel())


def _lora_linear_backward_flops(
    dys: list[Tensor],
    h: Tensor,
    weight: list[Tensor],
    A: Tensor,
    B: Tensor,
    needs_dx: bool = True,
    **_: Any,
) -> int:
    of_dx = _elements(weight) + A.numel() if needs_dx else 0
    return 2 * len(h) * (of_dx + 2 * B.numel())


def _fp8_product_flops(
    x: Tensor, x_scale: Any, W: Tensor, W_scale: Any, bias: Any, h: Any, B: list[Tensor], *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    return 2 * len(x) * (W.numel() + sum(own.numel() for own in B))


FLOPS: dict[str, Flops] = {
    "lorakit.planned_attention": attention_flops,
    "lorakit.planned_attention_backward": attention_backward_flops,
    "lorakit.nf4_linear": _nf4_linear_flops,
    "lorakit.lora_linear": _lora_linear_flops,
    "lorakit.lora_linear_backward": _lora_linear_backward_flops,
    "lorakit.fp8_product": _fp8_product_flops,
}
