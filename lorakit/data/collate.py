"""Collate encoded rows into the tensors of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.data.encode import EncodedRow
from lorakit.data.words import IGNORED_LABEL, token_labels

AnyBatch = TypeVar("AnyBatch", bound="Batch")


@dataclass(frozen=True)
class Batch:
    """The tensors of a micro-batch. ``input_ids`` (batch, length) is padded on the right."""

    input_ids: Tensor

    @property
    def loss_count(self) -> float:
        """The divisor of the sum of the losses: their number, or the sum of their weights."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are set, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def to(self: AnyBatch, device: torch.device) -> AnyBatch:
        """Copy to ``device`` without blocking, which CUDA can only do from pinned memory."""
        tensors = self.tensors()
        if device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class CausalBatch(Batch):
    """Sequences for a causal model.

    ``loss_indices`` (n,) are the positions in the flattened (batch * length) sequence whose next
    token counts in the loss, ``targets`` (n,) are those tokens, ``weights`` (n,) their weights in
    the loss unless all are 1. Packed sequences also have ``position_ids`` (batch, length), which
    restart at 0 with every row; ``cu_seq_lens`` (rows + 1,) are the row boundaries if all rows are
    in one sequence for variable-length attention. The last ``ignored`` of the targets are
    ``IGNORED``: padding that no loss is computed for.
    """

    loss_indices: Tensor
    targets: Tensor
    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    ignored: int = 0
    weights: Tensor | None = None

    @property
    def loss_count(self) -> float:
        """The number of trained tokens, or the sum of their weights."""
        if self.weights is not None:
            return float(self.weights.sum(dtype=torch.float64))
        return len(self.targets) - self.ignored


@dataclass(frozen=True)
class EncoderBatch(Batch):
    """Sequences for an encoder with their ``labels`` (batch,), or (batch, classes) for several
    labels per row, or (batch, length) for labels of words, of which there are ``words``.
    ``attention_mask`` is None if nothing is padded, ``token_type_ids`` if the tokenizer produces
    none."""

    labels: Tensor
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    words: int | None = None
    weight: float | None = None

    @property
    def loss_count(self) -> float:
        """The sum of the weights of their classes (``weight``), or the number of rows or, with
        labels of words, of words."""
        if self.weight is not None:
            return self.weight
        return len(self.labels) if self.words is None else self.words

    def model_inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of the model's forward pass."""
        return {name: tensor for name, tensor in self.tensors().items() if name != "labels"}


def collate_causal(rows: Sequence[EncodedRow], pad_id: int, multiple_of: int = 1) -> CausalBatch:
    """Put each row in its own sequence."""
    input_ids = _pad([row.input_ids for row in rows], pad_id, multiple_of)
    length = input_ids.shape[1]
    indices = [_loss_indices(row) + i * length for i, row in enumerate(rows)]
    return CausalBatch(
        input_ids=torch.from_numpy(input_ids),
        loss_indices=torch.from_numpy(np.concatenate(indices)),
        targets=torch.from_numpy(_targets(rows)),
        weights=_weights(rows),
    )


def collate_packed(
    bins: Sequence[Sequence[EncodedRow]], pad_id: int, multiple_of: int = 1
) -> CausalBatch:
    """Put each bin in its own sequence, with ``position_ids`` that restart at 0 for each row and
    for the padding."""
    widths = [sum(len(row.input_ids) for row in rows) for rows in bins]
    width = _round_up(max(widths), multiple_of)
    sequences = [_pack(rows, pad_id, width) for rows in bins]
    indices = [sequence.loss_indices + i * width for i, sequence in enumerate(sequences)]
    packed = [row for rows in bins for row in rows]
    return CausalBatch(
        input_ids=torch.from_numpy(np.stack([s.input_ids for s in sequences])),
        position_ids=torch.from_numpy(np.stack([s.position_ids for s in sequences])),
        loss_indices=torch.from_numpy(np.concatenate(indices)),
        targets=torch.from_numpy(_targets(packed)),
        weights=_weights(packed),
    )


def collate_documents(
    bins: Sequence[Sequence[EncodedRow]], pad_id: int, multiple_of: int = 1
) -> CausalBatch:
    """Put all rows in a single sequence: a batch of 1 with ``position_ids`` and ``cu_seq_lens``, in
    which the padding counts as one more row."""
    rows = [row for rows in bins for row in rows]
    lengths = [len(row.input_ids) for row in rows]
    width = _round_up(sum(lengths), multiple_of)
    sequence = _pack(rows, pad_id, width)
    padding = width - sum(lengths)
    boundaries = np.cumsum([*lengths, padding] if padding else lengths)
    return CausalBatch(
        input_ids=torch.from_numpy(sequence.input_ids).unsqueeze(0),
        position_ids=torch.from_numpy(sequence.position_ids).unsqueeze(0),
        loss_indices=torch.from_numpy(sequence.loss_indices),
        targets=torch.from_numpy(_targets(rows)),
        cu_seq_lens=torch.tensor([0, *boundaries], dtype=torch.int32),
        weights=_weights(rows),
    )


def collate_encoder(rows: Sequence[EncodedRow], pad_id: int, multiple_of: int = 1) -> EncoderBatch:
    """Put each row in its own sequence."""
    ids = [row.input_ids for row in rows]
    mask = _pad([np.ones_like(i) for i in ids], 0, multiple_of)
    types = [row.token_type_ids for row in rows if row.token_type_ids is not None]
    return EncoderBatch(
        input_ids=torch.from_numpy(_pad(ids, pad_id, multiple_of)),
        labels=_labels(rows, multiple_of),
        attention_mask=None if mask.all() else torch.from_numpy(mask),
        token_type_ids=torch.from_numpy(_pad(types, 0, multiple_of)) if types else None,
        words=None if rows[0].words is None else sum(row.trained_count for row in rows),
        weight=None if rows[0].class_weights is None else sum(row.loss_count for row in rows),
    )


def eval_batches(lengths: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of every row once, in batches, longest first to keep padding small."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@dataclass(frozen=True)
class _Sequence:
    """Packed rows followed by padding, as one flat sequence."""

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    loss_indices: NDArray[np.int64]


def _pack(rows: Sequence[EncodedRow], pad_id: int, width: int) -> _Sequence:
    input_ids = np.full(width, pad_id, dtype=np.int64)
    position_ids = np.zeros(width, dtype=np.int64)
    loss_indices, start = [], 0
    for row in rows:
        end = start + len(row.input_ids)
        input_ids[start:end] = row.input_ids
        position_ids[start:end] = np.arange(end - start)
        loss_indices.append(_loss_indices(row) + start)
        start = end
    position_ids[start:] = np.arange(width - start)
    return _Sequence(input_ids, position_ids, np.concatenate(loss_indices))


def _loss_indices(row: EncodedRow) -> NDArray[np.int64]:
    """Positions whose next token counts in the loss. The first token is never predicted."""
    return np.flatnonzero(row.loss_mask[1:])


def _targets(rows: Sequence[EncodedRow]) -> NDArray[np.int64]:
    return np.concatenate([row.input_ids[1:][row.loss_mask[1:]] for row in rows]).astype(np.int64)


def _labels(rows: Sequence[EncodedRow], multiple_of: int) -> Tensor:
    labels: list[Any] = [row.label for row in rows]
    of_tokens = [token_labels(row.label, row.words) for row in rows if row.words is not None]  # type: ignore[arg-type]
    if of_tokens:
        return torch.from_numpy(_pad(of_tokens, IGNORED_LABEL, multiple_of))
    is_vector = isinstance(labels[0], np.ndarray)
    return torch.from_numpy(np.stack(labels)) if is_vector else torch.tensor(labels)


def _weights(rows: Sequence[EncodedRow]) -> Tensor | None:
    if all(row.loss_weights is None for row in rows):
        return None
    weights = [row.loss_mask if row.loss_weights is None else row.loss_weights for row in rows]
    trained = [w[1:][row.loss_mask[1:]] for w, row in zip(weights, rows, strict=True)]
    return torch.from_numpy(np.concatenate(trained).astype(np.float32))


def _pad(arrays: Sequence[NDArray[Any]], value: int, multiple_of: int) -> NDArray[np.int64]:
    width = _round_up(max(len(array) for array in arrays), multiple_of)
    out = np.full((len(arrays), width), value, dtype=np.int64)
    for index, array in enumerate(arrays):
        out[index, : len(array)] = array
    return out


def _round_up(length: int, multiple_of: int) -> int:
    return -(-length // multiple_of) * multiple_of
