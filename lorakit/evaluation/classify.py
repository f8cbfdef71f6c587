"""Compute a classifier's outputs for texts without labels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.data.collate import collate_encoder, eval_batches
from lorakit.data.encode import EncodedSplit
from lorakit.errors import EvaluationError
from lorakit.evaluation.hf_generate import pad_id
from lorakit.evaluation.progress import ProgressMonitor
from lorakit.models.host_masks import host_masks


def class_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: EncodedSplit,
    batch_size: int,
    monitor: ProgressMonitor,
) -> NDArray[np.float32]:
    """Return the logits (rows, outputs) of every row, in order, in float32."""
    order, outputs = [], []
    for rows, logits in batch_logits(model, tokenizer, encoded, batch_size, monitor):
        order.append(rows)
        outputs.append(logits)
    values: NDArray[np.float32] = torch.cat(outputs).cpu().numpy()
    logits_by_row = np.empty_like(values)
    logits_by_row[np.concatenate(order)] = values
    return logits_by_row


def batch_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: EncodedSplit,
    batch_size: int,
    monitor: ProgressMonitor,
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield the row numbers of each batch, and the model's logits of these rows, in float32 and on
    its device.

    Batches are of rows of similar length, so little is computed for padding.
    """
    device = model.device
    for rows in eval_batches(encoded.lengths, batch_size):
        monitor.check()
        batch = collate_encoder([encoded[int(i)] for i in rows], pad_id(tokenizer)).to(device)
        with torch.inference_mode(), host_masks(device):
            logits: Tensor = model(**batch.model_inputs()).logits.float()
        yield rows, logits
        monitor.advance(len(rows))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The probabilities of the outputs, which are the last dimension of ``logits``."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: NDArray[np.float32] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def check_finite(logits: NDArray[np.float32], name: str) -> None:
    """Raise EvaluationError unless all outputs of the model ``name`` are finite."""
    if not np.isfinite(logits).all():
        raise EvaluationError(
            f"{name}: the model's outputs are not finite; likely causes: diverged weights, or "
            "float16 overflow (try bfloat16)"
        )
