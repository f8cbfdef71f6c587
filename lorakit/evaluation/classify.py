"""Compute a classifier's outputs for texts without labels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.data.collate import collate_encoder, eval_batches
from lorakit.data.encode import EncodedSplit
from lorakit.evaluation.hf_generate import pad_id
from lorakit.evaluation.progress import ProgressMonitor
from lorakit.models.causal import host_masks


def class_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: EncodedSplit,
    batch_size: int,
    monitor: ProgressMonitor,
) -> NDArray[np.float32]:
    """Return the logits (rows, outputs) of every row, in order, in float32.

    Batches are of rows of similar length, so little is computed for padding.
    """
    device = model.device
    order, outputs = [], []
    with torch.inference_mode(), host_masks(device):
        for rows in eval_batches(encoded.lengths, batch_size):
            monitor.check()
            batch = collate_encoder([encoded[int(i)] for i in rows], pad_id(tokenizer)).to(device)
            order.append(rows)
            outputs.append(model(**batch.model_inputs()).logits.float())
            monitor.advance(len(rows))
    values: NDArray[np.float32] = torch.cat(outputs).cpu().numpy()
    logits = np.empty_like(values)
    logits[np.concatenate(order)] = values
    return logits
