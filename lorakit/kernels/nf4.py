"""Products with a frozen weight in 4-bit NormalFloat (Dettmers et al. 2023, arXiv 2305.14314).

W is kept as bitsandbytes quantizes it: in blocks of 64 values of a row, each with its largest
absolute value (absmax), which is quantized to 8 bits in turn (double quantization). A product
dequantizes W into a temporary matrix, in the forward and again in the backward pass, within an
operator, so that neither autograd nor torch.compile keeps a dense W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

#: Values of W with a common absmax, and absmax values with a common scale.
BLOCK = 64
_ABSMAX_BLOCK = 256


class Nf4Weight(NamedTuple):
    """W (out, in): ``packed`` (out, in / 2) uint8, two values in a byte.

    The absmax of its blocks are scale * codes[absmax] + offset: ``absmax`` (out * in / 64,) uint8,
    ``scale`` (of each 256 of them,), ``offset`` () and ``codes`` (256,).
    """

    packed: Tensor
    absmax: Tensor
    scale: Tensor
    offset: Tensor
    codes: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]

    def dense(self, dtype: torch.dtype) -> Tensor:
        W: Tensor = _nf4_dense([*self], dtype)
        return W


def quantize_weight(W: Tensor) -> Nf4Weight:
    """W (out, in) in nf4; ``in`` is a multiple of 64."""
    if W.is_meta:
        return _empty_weight(W)
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        W, blocksize=BLOCK, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
    )
    rows, nested = packed.view(len(W), -1), state.state2
    assert nested.blocksize == _ABSMAX_BLOCK, nested.blocksize
    return Nf4Weight(rows, state.absmax, nested.absmax, state.offset, nested.code)


def _empty_weight(W: Tensor) -> Nf4Weight:
    """What ``quantize_weight`` returns, without values."""
    rows, columns = W.shape
    blocks = rows * columns // BLOCK
    scales = -(-blocks // _ABSMAX_BLOCK)
    return Nf4Weight(
        W.new_empty(rows, columns // 2, dtype=torch.uint8),
        W.new_empty(blocks, dtype=torch.uint8),
        W.new_empty(scales, dtype=torch.float32),
        W.new_empty((), dtype=torch.float32),
        W.new_empty(256, dtype=torch.float32),
    )


def stacked(weights: Sequence[Nf4Weight]) -> list[Tensor]:
    """The tensors of several weights of the same ``in``, for ``dense``: their ``packed`` as one,
    and the others of each."""
    packed = torch.cat([weight.packed for weight in weights])
    return [packed, *(tensor for weight in weights for tensor in weight[1:])]


def dense(weight: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """W (out, in) of the fields of an ``Nf4Weight``, or the stacked W of several (``stacked``)."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    packed, *rest = weight
    parts = []
    for at in range(0, len(rest), 4):
        absmax, scale, offset, codes = rest[at : at + 4]
        part = dequantize_blockwise(absmax, absmax=scale, code=codes, blocksize=_ABSMAX_BLOCK)
        parts.append(part.add_(offset))
    state = QuantState(
        torch.cat(parts) if len(parts) > 1 else parts[0],
        shape=torch.Size((packed.shape[0], 2 * packed.shape[1])),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    W: Tensor = dequantize_4bit(packed.view(-1, 1), state)
    return W


@library.custom_op("lorakit::nf4_dense", mutates_args=())
def _nf4_dense(weight: list[Tensor], dtype: torch.dtype) -> Tensor:
    return dense(weight, dtype)


@_nf4_dense.register_fake
def _(weight: list[Tensor], dtype: torch.dtype) -> Tensor:
    rows, half = weight[0].shape
    return weight[0].new_empty(rows, 2 * half, dtype=dtype)


@library.custom_op("lorakit::nf4_linear", mutates_args=())
def _nf4_linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, transposed: bool) -> Tensor:
    W = dense(weight, x.dtype)
    return torch.nn.functional.linear(x, W.t() if transposed else W, bias)


@_nf4_linear.register_fake
def _(x: Tensor, weight: list[Tensor], _bias: Tensor | None, transposed: bool) -> Tensor:
    packed = weight[0]
    return x.new_empty(x.shape[0], 2 * packed.shape[1] if transposed else packed.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, ctx.transposed = inputs
    ctx.save_for_backward(*weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    weight = list(ctx.saved_tensors)
    dx = _nf4_linear(dy, weight, None, not ctx.transposed)
    return dx, [None] * len(weight), None, None


_nf4_linear.register_autograd(_backward, setup_context=_save)


def nf4_linear(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """x W^T + b (n, out) for x (n, in), in x's dtype, with the frozen W of ``dense(weight)``."""
    y: Tensor = _nf4_linear(x, list(weight), bias, False)
    return y
