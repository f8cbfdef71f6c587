"""The losses of an encoder's labels, given its logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.data.words import IGNORED_LABEL


def label_losses(
    logits: Tensor,
    labels: Tensor,
    columns: Tensor | None = None,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """The sum of the losses of a batch's rows; with the ``reduction`` none, losses of which it is
    the sum, those of each row one after another.

    ``logits`` (rows, outputs) are in float32. A row's loss is

    - for ``logits`` (rows, tokens, outputs), the cross entropy of the class index of each token in
      ``labels`` (rows, tokens), except those that are ``IGNORED_LABEL``;
    - for one output, the squared error of its float label;
    - for ``labels`` (rows, classes) of 0 and 1, the mean over the outputs of the binary cross
      entropy of each, as in torch's BCEWithLogitsLoss;
    - otherwise the cross entropy of the class index in ``labels`` (rows,).

    ``columns`` (classes,) are the outputs of the task's classes; None means all, in order.
    ``weights`` (outputs,) are those of torch's losses: ``weight`` of the cross entropy, whose
    divisor is then the sum of the weights of the labels, and ``pos_weight`` of the binary one.
    """
    if logits.ndim == 3:
        logits, labels = logits.flatten(0, 1), labels.flatten()
        if columns is not None:
            labels = torch.where(labels == IGNORED_LABEL, labels, columns[labels.clamp(min=0)])
        return F.cross_entropy(
            logits, labels, weights, reduction=reduction, label_smoothing=label_smoothing,
            ignore_index=IGNORED_LABEL,
        )  # fmt: skip
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.float(), reduction=reduction)
    if labels.ndim == 2:
        targets = labels.to(logits.dtype)
        if columns is not None:
            targets = logits.new_zeros(logits.shape).index_copy(1, columns, targets)
        losses = F.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=weights, reduction=reduction
        )
        return losses / logits.shape[-1]
    if columns is not None:
        labels = columns[labels]
    return F.cross_entropy(
        logits, labels, weights, reduction=reduction, label_smoothing=label_smoothing
    )
