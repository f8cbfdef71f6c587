"""The tensors of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.data.encode import EncodedRow

Batch = dict[str, Tensor]


def collate_causal(rows: Sequence[EncodedRow], pad_id: int, multiple_of: int = 1) -> Batch:
    """``input_ids`` (batch, length) padded on the right; ``positions`` (n,) and ``targets`` (n,)
    as ``lorakit.models.causal.token_losses`` takes them."""
    input_ids = _pad([row.input_ids for row in rows], pad_id, multiple_of)
    length = input_ids.shape[1]
    positions = [np.flatnonzero(row.trained[1:]) + i * length for i, row in enumerate(rows)]
    targets = [row.input_ids[1:][row.trained[1:]] for row in rows]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "positions": torch.from_numpy(np.concatenate(positions)),
        "targets": torch.from_numpy(np.concatenate(targets).astype(np.int64)),
    }


def collate_packed(
    bins: Sequence[Sequence[EncodedRow]], pad_id: int, multiple_of: int = 1
) -> Batch:
    """One sequence a bin: ``input_ids`` and ``position_ids`` (bins, length), in which positions
    restart with each row and once more with the padding; ``positions`` and ``targets`` (n,)."""
    widths = [sum(len(row.input_ids) for row in rows) for rows in bins]
    width = -(-max(widths) // multiple_of) * multiple_of
    batch = [_document_batch(rows, pad_id, width) for rows in bins]
    for index, part in enumerate(batch):
        part["positions"] += index * width
    joined = {
        name: np.concatenate([part[name] for part in batch]) for name in ("positions", "targets")
    }
    stacked = {
        name: np.stack([part[name] for part in batch]) for name in ("input_ids", "position_ids")
    }
    return {name: torch.from_numpy(array) for name, array in (stacked | joined).items()}


def collate_documents(
    bins: Sequence[Sequence[EncodedRow]], pad_id: int, multiple_of: int = 1
) -> Batch:
    """All rows in one sequence: the tensors of ``collate_packed`` with a batch of 1, and
    ``cu_seq_lens`` (rows + 1,), where each begins and the last one ends; padding counts as one."""
    rows = [row for rows in bins for row in rows]
    length = sum(len(row.input_ids) for row in rows)
    width = -(-length // multiple_of) * multiple_of
    part = _document_batch(rows, pad_id, width)
    lengths = [len(row.input_ids) for row in rows] + [width - length] * (width > length)
    batch = {name: torch.from_numpy(array) for name, array in part.items()}
    return batch | {
        "input_ids": batch["input_ids"].unsqueeze(0),
        "position_ids": batch["position_ids"].unsqueeze(0),
        "cu_seq_lens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
    }


def _document_batch(rows: Sequence[EncodedRow], pad_id: int, width: int) -> dict[str, Any]:
    """Rows one behind another, then padding."""
    input_ids = np.full(width, pad_id, dtype=np.int64)
    position_ids = np.zeros(width, dtype=np.int64)
    positions, targets, start = [], [], 0
    for row in rows:
        end = start + len(row.input_ids)
        input_ids[start:end] = row.input_ids
        position_ids[start:end] = np.arange(end - start)
        positions.append(np.flatnonzero(row.trained[1:]) + start)
        targets.append(row.input_ids[1:][row.trained[1:]])
        start = end
    position_ids[start:] = np.arange(width - start)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "positions": np.concatenate(positions),
        "targets": np.concatenate(targets).astype(np.int64),
    }


def collate_encoder(rows: Sequence[EncodedRow], pad_id: int, multiple_of: int = 1) -> Batch:
    """``input_ids``, ``labels``, ``token_type_ids`` if there are any, and ``attention_mask`` if
    anything is padded."""
    ids = [row.input_ids for row in rows]
    mask = _pad([np.ones_like(i) for i in ids], 0, multiple_of)
    batch = {
        "input_ids": torch.from_numpy(_pad(ids, pad_id, multiple_of)),
        "labels": torch.tensor([row.label for row in rows]),
    }
    if not mask.all():
        batch["attention_mask"] = torch.from_numpy(mask)
    if rows[0].token_type_ids is not None:
        types = [row.token_type_ids for row in rows if row.token_type_ids is not None]
        batch["token_type_ids"] = torch.from_numpy(_pad(types, 0, multiple_of))
    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy without waiting, from pinned memory, without which CUDA would wait."""
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def eval_batches(lengths: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """All rows once, longest first, so that little is padded."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _pad(arrays: Sequence[NDArray[np.generic]], value: int, multiple_of: int) -> NDArray[np.int64]:
    longest = max(len(array) for array in arrays)
    width = -(-longest // multiple_of) * multiple_of
    out = np.full((len(arrays), width), value, dtype=np.int64)
    for index, array in enumerate(arrays):
        out[index, : len(array)] = array
    return out
