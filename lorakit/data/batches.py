"""Which rows make a step, and the tensors of a micro-batch.

The order is a function of seed and epoch alone, so a resumed run takes up where it was, and the
rows of an optimizer step do not depend on how accumulation splits it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.data.encode import EncodedRow, EncodedSplit

#: Rows are sorted by length within this many steps' worth, as a compromise with randomness.
_STEPS_PER_WINDOW = 50

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepPlan:
    """``rows_per_step`` = per-device batch size x accumulation steps x processes."""

    lengths: NDArray[np.int64]
    per_device_batch_size: int
    gradient_accumulation_steps: int
    processes: int
    seed: int
    group_by_length: bool

    @property
    def rows_per_step(self) -> int:
        return self.per_device_batch_size * self.gradient_accumulation_steps * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be smaller, but gives every process a row."""
        full, rest = divmod(len(self.lengths), self.rows_per_step)
        return full + (rest >= self.processes)

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """The rows of each step of an epoch."""
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.lengths))
        if not self.group_by_length:
            return self._steps(order)
        window = self.rows_per_step * _STEPS_PER_WINDOW
        sorted_windows = [
            part[np.argsort(-self.lengths[part], kind="stable")]
            for part in (order[i : i + window] for i in range(0, len(order), window))
        ]
        steps = self._steps(np.concatenate(sorted_windows))
        shuffled = generator.permutation(len(steps))
        # The longest rows go first: if memory is short, it shows at once.
        longest = int(np.argmax([self.lengths[steps[i]].max() for i in shuffled]))
        shuffled[[0, longest]] = shuffled[[longest, 0]]
        return [steps[i] for i in shuffled]

    def micro_batches(self, rows: NDArray[np.int64], process: int = 0) -> list[NDArray[np.int64]]:
        """One process's share of a step, in pieces of at most the per-device batch size."""
        own = rows[process :: self.processes]
        size = self.per_device_batch_size
        return [own[i : i + size] for i in range(0, len(own), size)]

    def _steps(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        size = self.rows_per_step
        return [order[i * size : (i + 1) * size] for i in range(self.steps_per_epoch)]


class StepReader:
    """Step number (from 0, over the whole run) -> epoch position and rows."""

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan
        self._epoch = -1
        self._steps: list[NDArray[np.int64]] = []

    def rows(self, step: int) -> NDArray[np.int64]:
        epoch, index = divmod(step, self._plan.steps_per_epoch)
        if epoch != self._epoch:
            self._steps, self._epoch = self._plan.epoch(epoch), epoch
        return self._steps[index]


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


def trained_count(split: EncodedSplit, rows: NDArray[np.int64]) -> int:
    """What a step's loss is divided by: its trained tokens, or for an encoder its rows."""
    if split.labels is not None:
        return len(rows)
    return sum(int(split[int(i)].trained[1:].sum()) for i in rows)


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
