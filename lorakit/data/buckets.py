"""Pad batches to few shapes, so that what is captured or compiled for a shape can be reused."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F

from lorakit.data.collate import Batch, CausalBatch, EncoderBatch
from lorakit.data.words import IGNORED_LABEL
from lorakit.kernels.linear_cross_entropy import IGNORED

#: Padding of a length is at most a quarter, and 11% on average; of the trained tokens, half.
_LENGTHS_PER_OCTAVE, _SHORTEST = 4, 8
_COUNTS_PER_OCTAVE, _FEWEST = 2, 64


def bucket(size: int, per_octave: int, smallest: int) -> int:
    """Round ``size`` up to the next bucket.

    Buckets are multiples of ``smallest``, and from one power of two to the next there are
    ``per_octave`` (a power of two) at equal distances.
    """
    octave = 1 << ((size - 1).bit_length() - 1) if size > 1 else 1
    step = max(smallest, octave // per_octave)
    return -(-size // step) * step


def length_bucket(length: int, coarser: int = 1) -> int:
    """Round up the length of a batch in tokens; ``coarser`` (1, 2) divides the number of
    buckets."""
    return bucket(length, _LENGTHS_PER_OCTAVE // coarser, _SHORTEST * coarser)


def count_bucket(count: int, coarser: int = 1) -> int:
    """Round up the number of trained tokens, as ``length_bucket`` does."""
    return bucket(count, _COUNTS_PER_OCTAVE // coarser, _FEWEST * coarser)


def pad_to_bucket(batch: Batch, pad_id: int, longest: int) -> Batch:
    """Pad ``batch`` to the length of its bucket, but not beyond ``longest`` tokens, and the trained
    tokens to a bucket with ``IGNORED``. Losses do not change. Packed batches have a fixed length
    already and are not supported."""
    length = batch.input_ids.shape[1]
    padded = length_bucket(length)
    padding = max(0, min(padded, longest) - length)
    if isinstance(batch, CausalBatch):
        return _pad_causal(batch, pad_id, padding)
    assert isinstance(batch, EncoderBatch), type(batch)
    return _pad_encoder(batch, pad_id, padding)


def _pad_causal(batch: CausalBatch, pad_id: int, padding: int) -> CausalBatch:
    assert batch.position_ids is None, "packed batches are not padded to buckets"
    length = batch.input_ids.shape[1]
    rows = batch.loss_indices.div(length, rounding_mode="floor")
    count = len(batch.targets)
    missing = count_bucket(count) - count
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, padding), value=pad_id),
        loss_indices=F.pad(batch.loss_indices + rows * padding, (0, missing)),
        targets=F.pad(batch.targets, (0, missing), value=IGNORED),
        ignored=missing,
        weights=None if batch.weights is None else F.pad(batch.weights, (0, missing)),
    )


def _pad_encoder(batch: EncoderBatch, pad_id: int, padding: int) -> EncoderBatch:
    mask, types, labels = batch.attention_mask, batch.token_type_ids, batch.labels
    if batch.words is not None:
        labels = F.pad(labels, (0, padding), value=IGNORED_LABEL)
    mask = batch.input_ids.new_ones(batch.input_ids.shape) if mask is None else mask
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, padding), value=pad_id),
        labels=labels,
        attention_mask=F.pad(mask, (0, padding)),
        token_type_ids=None if types is None else F.pad(types, (0, padding)),
    )
