"""Recipe and encoded rows -> the steps, and what makes tensors of their batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lorakit.data.collate import (
    Batch,
    collate_causal,
    collate_documents,
    collate_encoder,
    collate_packed,
)
from lorakit.data.encode import encoding_notes
from lorakit.data.plan import (
    Bin,
    IndexedSteps,
    Packing,
    Plan,
    RowPlan,
    StepSource,
    TokenPlan,
    pack_rows,
)
from lorakit.data.stream_steps import StreamSteps
from lorakit.pipeline.encoding import StreamedRows
from lorakit.recipe.sections import Recipe
from lorakit.training.setup import Prepared


@dataclass(frozen=True)
class Batching:
    """``described`` says what a step holds, for people."""

    steps: StepSource
    described: str

    def notes(self, recipe: Recipe) -> list[str]:
        """The notes on a stream's rows, which are known only once they have been read."""
        if not isinstance(self.steps, StreamSteps):
            return []
        seen = self.steps
        skipped = seen.skipped.note() if seen.skipped else None
        notes = encoding_notes(seen.counts, "train", seen.rows, recipe.task.max_length)
        return [*([skipped] if skipped else []), *notes]

    def rows_read(self) -> dict[str, int]:
        """What ``run.json`` says of a stream's rows once they have been read."""
        if not isinstance(self.steps, StreamSteps):
            return {}
        found = {"rows_read": self.steps.rows_read}
        if self.steps.skipped is not None:
            found["skipped_rows"] = len(self.steps.skipped)
        return found


def build_batching(prepared: Prepared, device: torch.device) -> Batching:
    recipe, rows = prepared.recipe, prepared.train
    if isinstance(rows, StreamedRows):
        return _streaming(recipe, rows)
    section, lengths = recipe.train, rows.lengths
    packing, described = None, f"{len(rows):,} rows"
    if recipe.task.packing:
        packing = Packing(lengths, recipe.task.max_length, section.seed)
        lengths = packing.bin_lengths
        described += f" in {len(packing):,} bins, {packing.fill:.1%} full"
    plan: Plan
    if section.max_tokens_per_batch is None or packing:
        plan = RowPlan(
            lengths=lengths,
            per_device_batch_size=_units_per_batch(recipe),
            gradient_accumulation_steps=section.gradient_accumulation_steps,
            seed=section.seed,
            group_by_length=section.group_by_length and packing is None,
        )
        described += f", {plan.units_per_step} a step"
    else:
        plan = TokenPlan(
            lengths=lengths,
            max_tokens_per_batch=section.max_tokens_per_batch,
            per_device_batch_size=section.per_device_batch_size,
            gradient_accumulation_steps=section.gradient_accumulation_steps,
            seed=section.seed,
            multiple_of=padding_multiple(prepared, device),
        )
        tokens = section.max_tokens_per_batch * section.gradient_accumulation_steps
        described += f", up to {tokens:,} tokens a step"
    return Batching(IndexedSteps(rows, plan, packing), described)


def _streaming(recipe: Recipe, rows: StreamedRows) -> Batching:
    section, capacity = recipe.train, recipe.task.max_length
    steps = StreamSteps(
        rows.stream,
        rows.encoder,
        per_device_batch_size=_units_per_batch(recipe),
        gradient_accumulation_steps=section.gradient_accumulation_steps,
        seed=section.seed,
        buffer_rows=recipe.task.shuffle_buffer_rows,
        group_by_length=section.group_by_length,
        bins=partial(pack_rows, capacity=capacity) if recipe.task.packing else None,
        skipped=rows.skipped,
    )
    units = f"bins of {capacity:,} tokens" if recipe.task.packing else "rows"
    return Batching(steps, f"a stream of rows, {steps.units_per_step} {units} a step")


def _units_per_batch(recipe: Recipe) -> int:
    """Rows, or bins where rows are packed."""
    units, tokens = recipe.train.per_device_batch_size, recipe.train.max_tokens_per_batch
    if recipe.task.packing and tokens:
        bins = tokens // recipe.task.max_length
        return min(units or bins, bins)
    assert units, "without a token budget there is a number of rows"
    return units


def build_collate(
    prepared: Prepared, device: torch.device, varlen: bool
) -> Callable[[list[Bin]], Batch]:
    """From the rows of a micro-batch to its tensors. ``varlen``: packed rows go in one sequence."""
    settings: Any = {
        "pad_id": prepared.tokenizer.pad_token_id,
        "multiple_of": padding_multiple(prepared, device),
    }
    if prepared.recipe.task.packing:
        return partial(collate_documents if varlen else collate_packed, **settings)
    collate = collate_causal if prepared.task.kind == "causal" else collate_encoder
    return lambda bins: collate([row for rows in bins for row in rows], **settings)


def padding_multiple(prepared: Prepared, device: torch.device) -> int:
    """8 for tensor cores, and for half precision on the CPU, whose kernels are compiled and kept
    for each length that occurs; float32 on the CPU pads no more than it must."""
    plain = device.type == "cpu" and prepared.model.dtype == torch.float32
    return 1 if plain else 8
