"""Plan the steps of a run from its encoded rows, and load their batches onto the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lorakit.data.buckets import pad_to_bucket
from lorakit.data.collate import (
    Batch,
    collate_causal,
    collate_documents,
    collate_encoder,
    collate_packed,
)
from lorakit.data.mixture import MixedSteps, Mixture
from lorakit.data.notes import encoding_notes
from lorakit.data.plan import (
    Bin,
    IndexedSteps,
    Numbers,
    Packing,
    Plan,
    RowPlan,
    Share,
    Step,
    StepSource,
    TokenPlan,
    pack_rows,
)
from lorakit.data.stream import FileChanged
from lorakit.data.stream_steps import StreamSteps
from lorakit.distributed.processes import gather
from lorakit.errors import DataError, counted
from lorakit.pipeline.encoding import StreamedRows
from lorakit.recipe.sections import Recipe
from lorakit.training.setup import Prepared

#: Loaders that share steps take each at about the same time.
_SHARED_STEPS = 4
Collate = Callable[[list[Bin]], Batch]
_ALONE = Share()


@dataclass(frozen=True)
class Batching:
    """``description`` tells the user what a step consists of, ``warning`` that it exceeds the
    data."""

    steps: StepSource
    description: str
    warning: str | None = None

    def notes(self, recipe: Recipe) -> list[str]:
        """Notes on a stream's rows, which are known only once the rows have been read."""
        if not isinstance(self.steps, StreamSteps):
            return []
        stream = self.steps
        skipped = stream.skipped.note() if stream.skipped else None
        notes = encoding_notes(stream.counts, "train", stream.rows, recipe.task.max_length)
        return [*([skipped] if skipped else []), *notes]


@dataclass(frozen=True)
class LoadedStep:
    """This process's batches of a step, on the device, and the counts of the whole step, as in
    ``Step``."""

    number: int
    micro_batches: list[Batch]
    token_count: int
    loss_count: float
    trained_count: int


class StepLoader:
    """Collates the batches of each step and copies them to ``device``.

    ``prefetch`` prepares the next step while the device computes the current one. It neither waits
    for the device nor draws random numbers, but may exchange a stream's rows with the other
    processes. An error in the rows is raised by the ``take`` of the step that needs them. With
    ``on_host``, steps stay in host memory.
    """

    def __init__(
        self, steps: StepSource, collate: Collate, device: torch.device, on_host: bool = False
    ) -> None:
        self._steps = steps
        self.collate = collate
        self.device = device
        self._loads_to = torch.device("cpu") if on_host else device
        self._ahead: LoadedStep | DataError | None = None
        self._first: Step | None = None
        self._rows_read: dict[str, int] = {}
        self._shared: dict[int, LoadedStep] | None = None

    def share(self, loaded: dict[int, LoadedStep]) -> None:
        """Take steps from ``loaded`` if they are there, and put others into it: for several loaders
        of the same rows in the same order. Not for a stream."""
        self._shared = loaded

    def take(self, number: int) -> LoadedStep:
        """Return a step; raises DataError if a row of a stream cannot be read or trained on."""
        ahead, self._ahead = self._ahead, None
        try:
            loaded = ahead if ahead is not None else self._load(number)
        finally:
            self._rows_read = _rows_read(self._steps)
        if isinstance(loaded, DataError):
            raise loaded
        assert loaded.number == number, "steps are taken in order"
        return loaded

    def prefetch(self, number: int) -> None:
        try:
            self._ahead = self._load(number)
        except DataError as error:
            self._ahead = error

    def first_step(self) -> list[Batch] | None:
        """Return the batches of the run's first step, or None if they came from a stream that was
        resumed after them."""
        step = self._first
        if step is None and self._steps.steps_per_epoch is not None:
            step = self._steps.step(0)
        return None if step is None else self._batches(step, self.device)

    def rows_read(self) -> dict[str, int]:
        """Return what ``run.json`` records about a stream up to the last step taken; nothing if
        none was."""
        return self._rows_read

    def met_bad_row(self) -> bool:
        """Whether the prefetched step has a row that cannot be read or trained on."""
        return isinstance(self._ahead, DataError) and not isinstance(self._ahead, FileChanged)

    def _load(self, number: int) -> LoadedStep:
        if self._shared is None:
            return self._collated(number)
        if number not in self._shared:
            self._shared[number] = self._collated(number)
            if len(self._shared) > _SHARED_STEPS:
                del self._shared[next(iter(self._shared))]
        return self._shared[number]

    def _collated(self, number: int) -> LoadedStep:
        step = self._steps.step(number)
        if number == 0:
            self._first = step
        batches = self._batches(step, self._loads_to)
        return LoadedStep(number, batches, step.tokens, step.loss_count, step.trained_count)

    def _batches(self, step: Step, device: torch.device) -> list[Batch]:
        return [self.collate(bins).to(device) for bins in step.micro_batches]


def _rows_read(steps: StepSource) -> dict[str, int]:
    if not isinstance(steps, StreamSteps):
        return {}
    skipped = {} if steps.skipped is None else {"skipped_rows": len(steps.skipped)}
    return {"rows_read": steps.rows_read} | skipped


def build_batching(prepared: Prepared, device: torch.device, share: Share = _ALONE) -> Batching:
    """Plan the steps of all processes; each takes its ``share`` of their micro-batches."""
    recipe, rows = prepared.recipe, prepared.train
    if isinstance(rows, StreamedRows):
        return _streaming(recipe, rows, share)
    if rows.sources:
        descriptions: list[str] = []

        def plan(lengths: Numbers) -> tuple[Plan, Packing | None]:
            found, packing, description = _plan(prepared, lengths, device, share)
            descriptions.append(description)
            return found, packing

        steps = MixedSteps(rows, Mixture(rows.sources, recipe.train.seed), plan, share)
        return Batching(steps, f"{descriptions[0]}, by weight")
    found, packing, description = _plan(prepared, rows.lengths, device, share)
    warning = _too_large(recipe, found) if isinstance(found, RowPlan) else None
    return Batching(IndexedSteps(rows, found, packing, share), description, warning)


def _plan(
    prepared: Prepared, lengths: Numbers, device: torch.device, share: Share
) -> tuple[Plan, Packing | None, str]:
    """Plan the steps of an epoch from the lengths of its rows, and describe them."""
    recipe = prepared.recipe
    micro_batches = recipe.train.gradient_accumulation_steps * share.world_size
    section, packing, description = recipe.train, None, counted(len(lengths), "row")
    if recipe.task.packing:
        packing = Packing(lengths, recipe.task.max_length, section.seed)
        lengths = packing.bin_lengths
        description += f" in {counted(len(packing), 'bin')}, {packing.fill:.1%} full"
    if section.max_tokens_per_batch is None or packing:
        plan = RowPlan(
            lengths=lengths,
            per_device_batch_size=_units_per_batch(recipe),
            micro_batches_per_step=micro_batches,
            seed=section.seed,
            group_by_length=section.group_by_length and packing is None,
        )
        return plan, packing, f"{description}, {plan.units_per_step} per step"
    tokens = section.max_tokens_per_batch * micro_batches
    limited = TokenPlan(
        lengths=lengths,
        max_tokens_per_batch=section.max_tokens_per_batch,
        per_device_batch_size=section.units_per_batch,
        micro_batches_per_step=micro_batches,
        seed=section.seed,
        multiple_of=padding_multiple(prepared, device),
    )
    return limited, None, f"{description}, up to {tokens:,} tokens per step"


def _too_large(recipe: Recipe, plan: RowPlan) -> str | None:
    """A warning about steps of more rows, or bins of packed rows, than the data has."""
    size, unit = len(plan.lengths), "bin" if recipe.task.packing else "row"
    if size >= plan.units_per_step:
        return None
    keys = "train.per_device_batch_size"
    if plan.micro_batches_per_step > 1:
        keys += " or train.gradient_accumulation_steps"
    return (
        f"warning: a step takes {counted(plan.units_per_step, unit)}, and the training data has "
        f"{counted(size, unit)}: each epoch is a single, smaller step; hint: reduce {keys}"
    )


def _streaming(recipe: Recipe, rows: StreamedRows, share: Share) -> Batching:
    section, capacity = recipe.train, recipe.task.max_length
    steps = StreamSteps(
        rows.stream,
        rows.encoder,
        per_device_batch_size=_units_per_batch(recipe),
        micro_batches_per_step=section.gradient_accumulation_steps * share.world_size,
        seed=section.seed,
        buffer_rows=recipe.task.shuffle_buffer_rows,
        group_by_length=section.group_by_length,
        bins=partial(pack_rows, capacity=capacity) if recipe.task.packing else None,
        skipped=rows.skipped,
        share=share,
        gather=gather,
        watch=rows.watch,
    )
    units = f"bins of {capacity:,} tokens" if recipe.task.packing else "rows"
    return Batching(steps, f"a stream of rows, {steps.units_per_step} {units} per step")


def step_size(recipe: Recipe, processes: int) -> tuple[int, ...]:
    """What decides, besides the seed and the token budget, which rows a step has."""
    micro_batches = recipe.train.gradient_accumulation_steps * processes
    if recipe.train.max_tokens_per_batch and not recipe.task.packing:
        return micro_batches, recipe.train.units_per_batch or 0
    return (micro_batches * _units_per_batch(recipe),)


def split_step(recipe: Recipe, size: int, processes: int) -> Recipe:
    """Return the recipe with batches of ``size`` in place of ``per_device_batch_size: auto``. With
    ``rows_per_step``, which it replaces, too, ``size`` must divide each process's share."""
    changes: dict[str, int | None] = {"per_device_batch_size": size}
    if (rows := recipe.train.rows_per_step) is not None:
        changes |= {
            "gradient_accumulation_steps": rows // (size * processes),
            "rows_per_step": None,
        }
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def _units_per_batch(recipe: Recipe) -> int:
    """Rows per micro-batch, or bins if rows are packed."""
    units, tokens = recipe.train.units_per_batch, recipe.train.max_tokens_per_batch
    if recipe.task.packing and tokens:
        bins = tokens // recipe.task.max_length
        return min(units or bins, bins)
    assert units, "the recipe has a batch size if it has no token budget"
    return units


def build_collate(prepared: Prepared, device: torch.device, varlen: bool) -> Collate:
    """Return the function that collates the rows of a micro-batch into tensors; with ``varlen``,
    packed rows become one sequence."""
    settings: Any = {
        "pad_id": prepared.tokenizer.pad_token_id,
        "multiple_of": padding_multiple(prepared, device),
    }
    if prepared.recipe.task.packing:
        return partial(collate_documents if varlen else collate_packed, **settings)
    collate = collate_causal if prepared.task.kind == "causal" else collate_encoder
    return lambda bins: collate([row for rows in bins for row in rows], **settings)


def bucketed(collate: Collate, prepared: Prepared) -> Collate:
    """Return ``collate`` with batches padded to few shapes."""
    pad_id = int(prepared.tokenizer.pad_token_id)
    longest = prepared.recipe.task.max_length
    return lambda bins: pad_to_bucket(collate(bins), pad_id, longest)


def padding_multiple(prepared: Prepared, device: torch.device) -> int:
    """Return the multiple that lengths are padded to: 8 for tensor cores. On the CPU, float32 needs
    no extra padding; in half precision, kernels are compiled and cached for each length, so that
    there are at most 64 lengths up to 512 tokens."""
    if device.type != "cpu":
        return 8
    if prepared.model.dtype == torch.float32:
        return 1
    return 4 if prepared.recipe.task.max_length <= 256 else 8
