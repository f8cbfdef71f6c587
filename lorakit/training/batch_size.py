"""``train.per_device_batch_size: auto``: the largest batch for which the device has memory.

If the recipe sets the rows of a step (``train.rows_per_step``), only how they are split depends on
the device: candidates are the divisors of this process's share. Otherwise they are powers of two.
Each is tried with the longest rows of the data; what training computes afterwards does not depend
on the trials.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from lorakit.data.collate import Batch
from lorakit.data.encode import EncodedSplit
from lorakit.data.plan import Bin, Packing
from lorakit.distributed.group import rank_and_world_size
from lorakit.distributed.processes import gather
from lorakit.distributed.strategy import Strategy
from lorakit.errors import UserError, memory_size
from lorakit.notes import Say
from lorakit.recipe.sections import Recipe
from lorakit.training.batching import bucketed, build_collate, split_step
from lorakit.training.build import Objective, build_objective
from lorakit.training.execution import Execution, choose_execution
from lorakit.training.memory import memory_advice
from lorakit.training.random_states import random_states, restore_random_states
from lorakit.training.record import peak_memory_bytes
from lorakit.training.setup import Prepared

#: The share of the available memory that a trial may allocate. The rest is the driver's, and what
#: is lost between blocks.
USABLE_SHARE = 0.95
#: Without ``rows_per_step``: larger batches are hardly faster, and an epoch has few steps.
_LARGEST = 512
#: The type of the two values that an optimizer keeps for each trained one.
_STATE_TYPES = {"adamw": torch.float32, "adamw_8bit": torch.uint8}
#: Runs a batch of this size, returns the peak memory in bytes, and raises torch.OutOfMemoryError.
Trial = Callable[[int], int]


@dataclass(frozen=True)
class BatchSize:
    """What was chosen, of which sizes that were tried, in order, and the peak memory of its
    trial."""

    per_device_batch_size: int
    tried: list[int]
    peak_memory_bytes: int


def largest_that_fits(sizes: Sequence[int], trial: Trial) -> BatchSize | None:
    """Find the largest of ``sizes``, in ascending order, for which ``trial`` does not run out of
    memory, by bisection; None if none fits. A smaller size than one that fits is assumed to fit."""
    peaks: dict[int, int] = {}
    tried: list[int] = []
    low, high = 0, len(sizes)  # the answer is sizes[low - 1] to sizes[high - 1]
    while low < high:
        middle = high - 1 if not tried else (low + high) // 2  # all rows at once, if they fit
        tried.append(sizes[middle])
        try:
            peaks[sizes[middle]] = trial(sizes[middle])
            low = middle + 1
        except torch.OutOfMemoryError:
            high = middle
    return BatchSize(sizes[low - 1], tried, peaks[sizes[low - 1]]) if low else None


def powers_of_two(limit: int) -> list[int]:
    """Return 1, 2, 4 ... up to ``limit``, at most 512."""
    return [2**n for n in range(10) if 2**n <= min(limit, _LARGEST)] or [1]


def batch_sizes(rows_per_step: int, processes: int) -> list[int]:
    """Return the sizes into which a process can split its share of a step; raises UserError if the
    processes cannot share it equally."""
    share, rest = divmod(rows_per_step, processes)
    if rest:
        raise UserError(
            f"train.rows_per_step = {rows_per_step}: {processes} processes cannot share a step "
            f"equally; allowed: a multiple of {processes}"
        )
    return [size for size in range(1, share + 1) if share % size == 0]


def check_batch_size(recipe: Recipe) -> None:
    """Raise UserError for ``auto`` if there is no GPU, or the processes cannot share a step."""
    section = recipe.train
    if section.per_device_batch_size != "auto":
        return
    if not torch.cuda.is_available():
        raise UserError(
            'train.per_device_batch_size = "auto": needs a GPU: on a CPU, a batch that is too '
            "large gets the process killed; allowed here: a number, with "
            "train.gradient_accumulation_steps instead of train.rows_per_step"
        )
    if section.rows_per_step is not None:
        batch_sizes(section.rows_per_step, rank_and_world_size()[1])


def fit_batch_size(
    prepared: Prepared, strategy: Strategy, say: Say
) -> tuple[Prepared, Objective | None]:
    """Replace ``auto`` by the largest batch size that fits on the device of every process; return
    also the objective on its device, if it was built for that. Raises UserError if no size fits, or
    for a sharded model."""
    recipe, processes = prepared.recipe, rank_and_world_size()[1]
    if recipe.train.per_device_batch_size != "auto":
        return prepared, None
    if strategy.is_sharded:
        raise UserError(
            'train.per_device_batch_size = "auto": not supported with FSDP; allowed: a number'
        )
    objective = build_objective(prepared, strategy, say)
    trial = BatchTrial(prepared, objective, strategy)
    if recipe.train.rows_per_step is not None:
        sizes = batch_sizes(recipe.train.rows_per_step, processes)
    else:
        batches_per_step = recipe.train.gradient_accumulation_steps * processes
        sizes = powers_of_two(trial.units // batches_per_step)
    with _unaffected(strategy.device):
        found = largest_that_fits(sizes, lambda size: _in_all_processes(trial, size))
    if found is None:
        advice = "; or ".join(memory_advice(split_step(recipe, 1, processes)))
        raise UserError(
            'train.per_device_batch_size = "auto": a single row does not fit on '
            f"{strategy.device}; {advice}"
        )
    recipe = split_step(recipe, found.per_device_batch_size, processes)
    say(
        f"train.per_device_batch_size = {found.per_device_batch_size}: the largest that fits (of "
        f"{', '.join(map(str, sorted(found.tried)))} tried), "
        f"{recipe.train.gradient_accumulation_steps} batches per step; peak memory "
        f"{memory_size(found.peak_memory_bytes)}"
    )
    return replace(prepared, recipe=recipe), objective


def trial_share(execution: Execution) -> float:
    """The share of the usable memory that an eager pass of a batch may take: that of captured
    passes comes on top of what eager ones leave to the allocator."""
    return 0.5 if execution.mode == "cuda_graphs" and not execution.if_room else 1.0


class BatchTrial:
    """Forward and backward passes of the longest rows, eagerly, with the memory of the optimizer's
    state allocated. Weights, gradients and the modules' modes are as before afterwards; random
    numbers are drawn."""

    def __init__(self, prepared: Prepared, objective: Objective, strategy: Strategy) -> None:
        self._prepared, self._objective, self._strategy = prepared, objective, strategy
        self.units, self._longest = _longest_first(prepared)

    def __call__(self, size: int) -> int:
        device, was_training = self._strategy.device, self._objective.training
        execution = self._execution(size)
        self._objective.train()
        try:
            with _limited_memory(device, USABLE_SHARE * trial_share(execution)):
                self._pass(self._batch(size, execution))
                return peak_memory_bytes(device)
        finally:
            self._objective.zero_grad(set_to_none=True)
            self._objective.train(was_training)

    def _pass(self, batch: Batch) -> None:
        kind = _STATE_TYPES.get(self._prepared.recipe.train.optimizer)
        trained = [p for p in self._objective.parameters() if p.requires_grad]
        state = [torch.empty_like(p, dtype=kind) for p in trained for _ in range(2) if kind]
        with self._strategy.accelerator.autocast():
            loss = self._objective(batch)
        if loss.requires_grad:  # false if only experts train and none got a token
            loss.backward()
        del state

    def _batch(self, size: int, execution: Execution) -> Batch:
        device = self._strategy.device
        collate = build_collate(self._prepared, device, self._objective.varlen)
        if execution.mode == "cuda_graphs":
            collate = bucketed(collate, self._prepared)
        return collate(self._longest(size)).to(device)

    def _execution(self, size: int) -> Execution:
        """That of a short run with batches of this size."""
        recipe = split_step(self._prepared.recipe, size, rank_and_world_size()[1])
        prepared = replace(self._prepared, recipe=recipe)
        return choose_execution(prepared, self._strategy.device, total_steps=1)


def _longest_first(prepared: Prepared) -> tuple[int, Callable[[int], list[Bin]]]:
    """Return the number of rows, or bins of packed rows, and a function that returns the longest
    of them."""
    rows, recipe = prepared.train, prepared.recipe
    assert isinstance(rows, EncodedSplit), "auto is not supported with a stream"
    if not recipe.task.packing:
        order = np.argsort(-rows.lengths, kind="stable")
        return len(order), lambda count: [[rows[int(i)]] for i in order[:count]]
    packing = Packing(rows.lengths, recipe.task.max_length, recipe.train.seed)
    bins = packing.epoch(0)
    order = np.argsort(-packing.bin_lengths, kind="stable")
    return len(order), lambda count: [
        [rows[int(i)] for i in bins[int(unit)]] for unit in order[:count]
    ]


def _in_all_processes(trial: Trial, size: int) -> int:
    """Return the largest peak of all processes; raises torch.OutOfMemoryError if one of them has
    run out of memory."""
    try:
        own = trial(size)
    except torch.OutOfMemoryError:
        own = None
    peaks = [peak for peak in gather(own) if peak is not None]
    if len(peaks) < rank_and_world_size()[1]:
        raise torch.OutOfMemoryError(f"a batch of {size} does not fit")
    return max(peaks)


@contextmanager
def _unaffected(device: torch.device) -> Iterator[None]:
    """Restore the states of random number generators and of the allocator after the block."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states([states])
        _release(device)


@contextmanager
def _limited_memory(device: torch.device, share: float) -> Iterator[None]:
    """Limit allocations in the block to ``share`` of the device memory available to this process,
    given other processes and any limit already set."""
    if device.type != "cuda":
        yield
        return
    _release(device)
    index = torch.cuda.current_device()  # a device that is named "cuda" has none
    before = torch.cuda.get_per_process_memory_fraction(index)
    free, total = torch.cuda.mem_get_info(index)
    available = (free + torch.cuda.memory_reserved(index)) / total
    torch.cuda.set_per_process_memory_fraction(share * min(before, available), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)


def _release(device: torch.device) -> None:
    """Free what the allocator has cached, and forget the peak."""
    if device.type != "cuda":
        return
    gc.collect()  # of tensors in the frames of an error
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
