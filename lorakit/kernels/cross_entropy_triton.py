"""Cross entropy on a GPU: one kernel reads the logits twice and overwrites them with the gradient.

The reference is the PyTorch code in ``linear_cross_entropy``, which makes about ten passes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _transformed(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """z and dz/dx of z = softcap * tanh(scale * x / softcap), or z = scale * x."""
    z = x * scale
    if HAS_SOFTCAP:
        tanh = 1 - 2 / (tl.exp(2 * z / softcap) + 1)
        return tanh * softcap, (1 - tanh * tanh) * scale
    return z, x * 0 + scale


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits,
    targets,
    losses,
    row_stride,
    vocab,
    scale,
    softcap,
    smoothing,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row)
    top = -float("inf")
    total = 0.0
    plain_sum = 0.0
    for start in range(0, vocab, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < vocab
        x = tl.load(logits + index, mask=inside, other=0.0).to(tl.float32)
        z, _ = _transformed(x, scale, softcap, HAS_SOFTCAP)
        plain_sum += tl.sum(tl.where(inside, z, 0.0))
        z = tl.where(inside, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top))
        top = new_top
    log_total = tl.log(total) + top
    valid = target >= 0
    hit, _ = _transformed(
        tl.load(logits + tl.maximum(target, 0)).to(tl.float32), scale, softcap, HAS_SOFTCAP
    )
    loss = log_total - (1 - smoothing) * hit - smoothing * plain_sum / vocab
    tl.store(losses + row, tl.where(valid, loss, 0.0))
    if NEEDS_GRAD:
        for start in range(0, vocab, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < vocab
            x = tl.load(logits + index, mask=inside, other=0.0).to(tl.float32)
            z, slope = _transformed(x, scale, softcap, HAS_SOFTCAP)
            grad = tl.exp(z - log_total) - smoothing / vocab
            grad = tl.where(index == target, grad - (1 - smoothing), grad) * slope
            tl.store(logits + index, tl.where(valid, grad, 0.0), mask=inside)


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float,
    scale: float,
    softcap: float | None,
    needs_grad: bool,
) -> Tensor:
    """Each row's loss (n,) in float32, 0 where the target is negative.

    logits (n, vocab) are contiguous, before the transform z = softcap * tanh(scale * x / softcap);
    with ``needs_grad`` they are overwritten with the gradient of the losses' sum.
    """
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(8192, triton.next_power_of_2(vocab))
    kernel: Any = _cross_entropy_kernel[(rows,)]
    kernel(
        logits,
        targets,
        losses,
        logits.stride(0),
        vocab,
        scale,
        softcap or 1.0,
        label_smoothing,
        HAS_SOFTCAP=softcap is not None,
        NEEDS_GRAD=needs_grad,
        BLOCK=block,
        num_warps=16 if block >= 4096 else 4,
    )
    return losses
