"""Cross entropy of a linear layer's output, without the logits of the whole batch.

The rows are processed in chunks: a chunk's logits are freed once its loss and its gradient with
respect to the hidden states are computed. The weight is frozen and gets no gradient, and nothing is
recomputed in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: The target of a row that has no loss, as in torch's cross_entropy.
IGNORED = -100
#: Logits of one chunk, in elements: 32 MiB in float32 on the CPU, 128 MiB on a GPU.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**25, "meta": 2**25}
#: Half-precision logits of one chunk for the fused kernel: 512 MiB.
FUSED_CHUNK_ELEMENTS = 2**28
#: A GPU computes products in tiles of so many rows: with a few more, it computes a further tile.
_TILE_ROWS = 256


@dataclass(frozen=True)
class LogitTransform:
    """How a model transforms W h + b before the softmax: a factor, then c * tanh(z / c)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale if self.scale != 1.0 else logits
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float = 0.0,
    transform: LogitTransform | None = None,
    fused: bool = False,
    row_weights: Tensor | None = None,
) -> Tensor:
    """The sum over n rows of -log softmax(W h + b)[target], a float32 scalar.

    hidden (n, in_features), weight (vocab, in_features) frozen, targets (n,) class indices, or
    ``IGNORED``. ``row_weights`` (n,) float32 multiply the rows' losses. With label smoothing e the
    target is (1 - e) one-hot + e / vocab, as in torch's cross_entropy. ``fused`` uses a Triton
    kernel: on a GPU only.
    """
    assert not weight.requires_grad, "use checkpointed_cross_entropy for a trained output layer"
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        *(hidden, weight, bias, targets, label_smoothing, transform or LogitTransform(), fused),
        row_weights,
    )
    return loss


def rows_per_chunk(vocab: int, device: torch.device, fused: bool = False) -> int:
    elements = FUSED_CHUNK_ELEMENTS if fused else CHUNK_ELEMENTS.get(device.type, 2**23)
    rows = max(1, elements // vocab)
    return rows - rows % _TILE_ROWS if fused and rows > _TILE_ROWS else rows


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        label_smoothing: float,
        transform: LogitTransform,
        fused: bool,
        row_weights: Tensor | None,
    ) -> Tensor:
        compute = _fused_losses_ if fused else _losses_
        rows = rows_per_chunk(weight.shape[0], hidden.device, fused)
        grad = torch.empty_like(hidden) if hidden.requires_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            ignored = targets[part] < 0
            logits = F.linear(hidden[part], weight, bias)
            losses, d_logits = compute(
                logits, targets[part], label_smoothing, transform, grad is not None
            )
            losses.masked_fill_(ignored, 0)
            if row_weights is not None:
                losses = losses * row_weights[part]
            loss += losses.sum()
            if grad is not None:
                rows_grad = d_logits.to(weight.dtype) @ weight
                if row_weights is not None:  # in float32
                    rows_grad = rows_grad * row_weights[part].unsqueeze(1)
                grad[part] = rows_grad.masked_fill_(ignored.unsqueeze(1), 0)
            del logits, d_logits  # before the next ones are allocated
        ctx.grad = grad
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = ctx.grad * grad_outputs[0].to(ctx.grad.dtype)
        ctx.grad = None
        return grad, None, None, None, None, None, None, None


def _losses_(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float,
    transform: LogitTransform,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Each row's loss, and with ``needs_grad`` its gradient with respect to ``logits``, before the
    transform; those of ignored rows have no meaning."""
    z = transform(logits.float())
    target = targets.clamp_min(0).unsqueeze(1)
    slope = _slope(z, transform) if needs_grad else None
    losses, softmax = _losses_and_softmax_(z, target, label_smoothing)
    return losses, _d_logits_(softmax, target, label_smoothing, slope) if needs_grad else softmax


def _fused_losses_(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float,
    transform: LogitTransform,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The same with a kernel that overwrites the logits, in their own dtype, with the gradient."""
    if logits.is_meta:
        return logits.new_empty(len(logits), dtype=torch.float32), logits
    from lorakit.kernels.cross_entropy_triton import cross_entropy_

    scale, softcap = transform.scale, transform.softcap
    return cross_entropy_(logits, targets, label_smoothing, scale, softcap, needs_grad), logits


def _losses_and_softmax_(
    logits: Tensor, target: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Each row's loss, and softmax(z), which overwrites ``logits``."""
    top = logits.amax(dim=1, keepdim=True)
    hit = logits.gather(1, target).squeeze(1)
    mean = logits.mean(dim=1) if label_smoothing else None
    total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
    log_total = (total.log() + top).squeeze(1)
    losses = log_total - hit
    if mean is not None:
        losses = (1 - label_smoothing) * losses + label_smoothing * (log_total - mean)
    return losses, logits.div_(total)


def _slope(logits: Tensor, transform: LogitTransform) -> Tensor | float:
    """dz / d(W h + b), where z = c tanh(scale * (W h + b) / c)."""
    if not transform.softcap:
        return transform.scale
    return (1 - (logits / transform.softcap).square_()).mul_(transform.scale)


def _d_logits_(
    softmax: Tensor, target: Tensor, label_smoothing: float, slope: Tensor | float | None
) -> Tensor:
    """(softmax(z) minus the smoothed target) times the slope, which overwrites ``softmax``."""
    if label_smoothing:
        softmax.sub_(label_smoothing / softmax.shape[1])
    softmax.scatter_add_(
        1, target, torch.full_like(target, label_smoothing - 1, dtype=softmax.dtype)
    )
    return (
        softmax
        if slope is None or (isinstance(slope, float) and slope == 1.0)
        else softmax.mul_(slope)
    )


def checkpointed_cross_entropy(
    head: Any,
    hidden: Tensor,
    targets: Tensor,
    vocab: int,
    label_smoothing: float = 0.0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """The same sum for any ``head`` (hidden -> logits), including trained and adapted ones.

    A chunk's logits are recomputed in the backward pass instead of being kept.
    """
    from torch.utils.checkpoint import checkpoint

    def chunk_loss(rows: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        return summed_cross_entropy(head(rows).float(), target, label_smoothing, weights)

    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    rows = rows_per_chunk(vocab, hidden.device)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        weights = None if row_weights is None else row_weights[part]
        arguments = hidden[part], targets[part], weights
        loss = loss + checkpoint(chunk_loss, *arguments, use_reentrant=False)
    return loss


def summed_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """The same sum, given the float32 logits (n, vocab)."""
    if row_weights is None:
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return (losses * row_weights).sum()
