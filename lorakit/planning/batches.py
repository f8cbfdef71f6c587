"""The batches of a run: the largest one, which decides the memory, and the tokens of all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from lorakit.data.buckets import length_bucket
from lorakit.data.collate import Batch
from lorakit.data.encode import EncodedRow, EncodedSplit
from lorakit.data.mixture import MixedSteps
from lorakit.data.plan import Bin, IndexedSteps, Numbers
from lorakit.planning.assumed import full_row
from lorakit.training.batching import Batching, bucketed, build_collate, padding_multiple
from lorakit.training.execution import Execution
from lorakit.training.setup import Prepared

#: The first step has the longest rows; later ones are read for the number of tokens only.
_STEPS_READ = 20_000


@dataclass(frozen=True)
class RunBatches:
    """``largest`` has the most tokens. What a step has are means over the steps, ``padded`` if they
    include padding; ``passes_per_step`` are micro-batches. Tokens are None for a stream."""

    largest: Batch
    tokens_per_epoch: int | None
    tokens_per_step: float | None
    padded_tokens_per_step: float
    passes_per_step: int


def run_batches(
    prepared: Prepared,
    batching: Batching,
    device: torch.device,
    execution: Execution,
    varlen: bool,
    longest: int | None = None,
) -> RunBatches:
    """The batches of the first epoch; ``longest`` cuts rows to so many tokens, as a smaller
    ``task.max_length`` would."""
    collate = build_collate(prepared, device, varlen)
    has_buckets = execution.mode == "cuda_graphs"
    if has_buckets:
        collate = bucketed(collate, prepared)
    rows, steps = prepared.train, batching.steps
    passes = prepared.recipe.train.gradient_accumulation_steps
    if not isinstance(rows, EncodedSplit) or not isinstance(steps, IndexedSteps | MixedSteps):
        batch = collate(_full_bins(prepared))
        return RunBatches(batch, None, None, float(batch.input_ids.numel() * passes), passes)
    lengths = rows.lengths if longest is None else np.minimum(rows.lengths, longest)
    multiple = padding_multiple(prepared, device)
    longest_bucket = prepared.recipe.task.max_length if has_buckets else None
    sizes: list[int] = []
    largest: tuple[tuple[int, int], list[Numbers]] = ((0, 0), [])
    tokens = 0
    for number in range(steps.steps_per_epoch):
        for units in steps.row_numbers(number):
            padded = _padded_tokens(units, lengths, multiple, longest_bucket)
            every = np.concatenate(units)
            size = (padded, int(rows.trained_counts[every].sum()))
            tokens += int(lengths[every].sum())
            sizes.append(padded)
            if size > largest[0]:
                largest = (size, units)
        if number == _STEPS_READ:
            break
    bins = [[_cut(rows[int(i)], longest) for i in unit] for unit in largest[1]]
    steps_read = min(steps.steps_per_epoch, _STEPS_READ + 1)
    return RunBatches(
        collate(bins),
        tokens if steps_read == steps.steps_per_epoch else int(lengths.sum()),
        tokens / steps_read,
        sum(sizes) / steps_read,
        -(-len(sizes) // steps_read),
    )


def _padded_tokens(
    units: list[Numbers], lengths: Numbers, multiple: int, longest_bucket: int | None
) -> int:
    """The tokens of a batch with padding: to a ``multiple``, and with ``longest_bucket`` to a
    bucket of at most so many."""
    width = max(int(lengths[rows].sum()) for rows in units)
    width = -(-width // multiple) * multiple
    if longest_bucket is not None:
        width = max(width, min(length_bucket(width), longest_bucket))
    return len(units) * width


def _cut(row: EncodedRow, longest: int | None) -> EncodedRow:
    """The first ``longest`` tokens of ``row``."""
    if longest is None or len(row.input_ids) <= longest:
        return row
    changes = {
        name: value[:longest]
        for name in ("input_ids", "loss_mask", "token_type_ids", "loss_weights", "words")
        if (value := getattr(row, name)) is not None
    }
    return replace(row, **changes)


def _full_bins(prepared: Prepared) -> list[Bin]:
    """Rows of a stream, each of ``task.max_length`` tokens, all of which are trained."""
    train, length = prepared.recipe.train, prepared.recipe.task.max_length
    count = train.units_per_batch or 1
    if train.max_tokens_per_batch is not None:
        fitting = max(1, train.max_tokens_per_batch // length)
        count = min(train.units_per_batch or fitting, fitting)
    return [[full_row(prepared.task, prepared.recipe.task)]] * count
