"""Carries out a merge plan by streaming tensors from the base's files into the output's.

Each changed tensor is read, summed in float32, rounded, checked and written in chunks of rows; the
others are copied from file to file. All cores work in parallel, with a few chunks each in memory,
or one whole matrix at a time for methods and quantized bases that need it.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.adapters.merge.checkpoint import (
    DTYPES,
    Checkpoint,
    StoredTensor,
    memory_of,
    read_into,
)
from lorakit.adapters.merge.output import OutputFiles, Place, write_at
from lorakit.adapters.merge.plan import (
    GroupTask,
    MergePlan,
    Task,
    group_values,
    not_finite,
)
from lorakit.adapters.merge.updates import LowRankUpdate, low_rank, merged_rows, merged_sum
from lorakit.adapters.merge.workers import Buffers, Job, OnProgress, run_jobs
from lorakit.adapters.peft.read import is_finite

#: Elements of a chunk. Its float32 copies, 1 MiB each, fit in the processor's cache.
CHUNK_ELEMENTS = 2**18
_COPY_BYTES = 2**26


def write_tensors(
    folder: Path,
    plan: MergePlan,
    checkpoint: Checkpoint,
    places: Mapping[str, Place],
    on_progress: OnProgress = lambda _done, _total: None,
) -> None:
    """Fill the files in ``folder``, which already have their headers. ``on_progress`` receives the
    bytes done and the total. Raises AdapterError for a value that is not finite."""
    total = sum(output.size_bytes for output in plan.outputs.values())
    with ExitStack() as stack:
        files = {}
        for file in sorted({place.file for place in places.values()}):
            files[file] = os.open(folder / file, os.O_WRONLY)
            stack.callback(os.close, files[file])
        output = OutputFiles(files, places, plan.outputs)
        for file_ in checkpoint.files:
            checkpoint.descriptor(file_)  # opened here, since the workers share the table
        jobs = _jobs(plan, checkpoint, output)
        run_jobs(jobs, list(files.values()), total, on_progress)


def _jobs(plan: MergePlan, checkpoint: Checkpoint, output: OutputFiles) -> Iterator[Job]:
    """Yield the jobs in file order, so that reads and writes are sequential."""
    one_matrix = threading.Lock()
    for group in plan.groups:
        yield _group_job(group, checkpoint, output, one_matrix)
    for task in plan.tasks:
        if task.is_copy:
            assert task.source is not None
            yield from _copy_jobs(task.name, task.source, checkpoint, output)
        elif task.given is None and task.source is not None and task.source.is_quantized:
            yield partial(_whole_job, task, checkpoint, output, one_matrix)
        elif task.updates and (products := low_rank(task.updates)) is not None:
            yield from _row_jobs(task, products, checkpoint, output)
        elif task.updates:
            yield from _method_jobs(task, checkpoint, output, one_matrix)
        elif task.rows is not None:
            yield from _row_jobs(task, (), checkpoint, output)
        else:
            yield from _cast_jobs(task, checkpoint, output)


def _copy_jobs(
    name: str, source: StoredTensor, checkpoint: Checkpoint, output: OutputFiles
) -> Iterator[Job]:
    for at in range(0, source.size_bytes, _COPY_BYTES):
        count = min(_COPY_BYTES, source.size_bytes - at)

        def job(_buffers: Buffers, at: int = at, count: int = count) -> int:
            handle, start = output.at(name)
            _copy(checkpoint.descriptor(source.file), source.start + at, handle, start + at, count)
            return count

        yield job


def _copy(source: int, start: int, target: int, to: int, count: int) -> None:
    """Copy ``count`` bytes from file to file, in the kernel where that is supported."""
    done = 0
    try:
        while done < count:
            copied = os.copy_file_range(source, target, count - done, start + done, to + done)
            if not copied:
                raise OSError("a file of the base was truncated while it was read")
            done += copied
    except (AttributeError, OSError):  # another file system, or not Linux
        buffer = memoryview(bytearray(min(count - done, 2**22)))
        while done < count:
            part = buffer[: min(len(buffer), count - done)]
            read_into(source, part, start + done)
            write_at(target, part, to + done)
            done += len(part)


def _row_jobs(
    task: Task, products: Sequence[LowRankUpdate], checkpoint: Checkpoint, output: OutputFiles
) -> Iterator[Job]:
    """Add low-rank products, in chunks of rows, and replace those of tokens; a bias is one
    column."""
    rows, columns = (*task.output.shape, 1)[:2]
    stored = task.source.shape[0] if task.source and task.given is None else rows
    for first, count in _chunks(rows, columns):

        def job(buffers: Buffers, first: int = first, count: int = count) -> int:
            old = min(count, max(0, stored - first))
            W = _read_rows(task, first, old, checkpoint, buffers)
            wide = buffers.get("wide", count * columns, torch.float32).view(count, columns)
            wide[:old].copy_(W)
            delta = buffers.get("delta", count * columns, torch.float32).view(count, columns)
            for product in products:
                product.add_rows_(wide, first, delta)
            if task.rows is not None:
                task.rows.put(wide, first)
            return _store(task, wide, first, output, buffers)

        yield job


def _method_jobs(
    task: Task, checkpoint: Checkpoint, output: OutputFiles, one_matrix: threading.Lock
) -> Iterator[Job]:
    """Merge other methods: in chunks of rows if they can, else as a whole matrix."""
    rows, columns = math.prod(task.output.shape[:-1]), task.output.shape[-1]
    if merged_rows(task.updates, torch.zeros(1, columns), 0) is None:
        yield partial(_whole_job, task, checkpoint, output, one_matrix)
        return
    for first, count in _chunks(rows, columns):

        def job(buffers: Buffers, first: int = first, count: int = count) -> int:
            W = _read_rows(task, first, count, checkpoint, buffers)
            merged = merged_rows(task.updates, W, first)
            assert merged is not None
            return _store(task, merged, first, output, buffers)

        yield job


def _whole_job(
    task: Task,
    checkpoint: Checkpoint,
    output: OutputFiles,
    one_matrix: threading.Lock,
    buffers: Buffers,
) -> int:
    with one_matrix:
        if task.given is not None:
            W = task.given
        else:
            assert task.stored is not None
            W = checkpoint.read(task.stored)
        merged = merged_sum(task.updates, W).flatten(0, -2)  # stacked experts have 3 dimensions
        del W
        if task.rows is not None:
            missing = math.prod(task.output.shape[:-1]) - len(merged)
            merged = F.pad(merged, (0, 0, 0, missing)) if missing else merged.clone()
            task.rows.put(merged)
        size = 0
        for first, count in _chunks(*merged.shape):
            size += _store(task, merged[first : first + count], first, output, buffers)
        return size


def _cast_jobs(task: Task, checkpoint: Checkpoint, output: OutputFiles) -> Iterator[Job]:
    """Write the adapter's own values, or the base's, in the output's dtype."""
    for first, count in _chunks(task.output.parameters, 1):

        def job(buffers: Buffers, first: int = first, count: int = count) -> int:
            if task.given is not None:
                values = task.given.reshape(-1)[first : first + count]
            else:
                values = _read(task.source, first, count, checkpoint, buffers)
            return _store(task, values.view(-1, 1), first, output, buffers)

        yield job


def _group_job(
    task: GroupTask, checkpoint: Checkpoint, output: OutputFiles, one_matrix: threading.Lock
) -> Job:
    def job(_buffers: Buffers) -> int:
        with one_matrix:
            values = group_values(task, checkpoint)
            return sum(output.write(name, value) for name, value in values.items())

    return job


def _chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows). Multiples of sixteen keep every chunk of a factor aligned,
    which may affect the last bits of a product."""
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    step = step // 16 * 16 if step > 16 else 16
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def _read_rows(
    task: Task, first: int, count: int, checkpoint: Checkpoint, buffers: Buffers
) -> Tensor:
    columns = (*task.output.shape, 1)[1]
    if task.given is not None:
        return task.given[first : first + count].view(count, columns)
    flat = _read(task.source, first * columns, count * columns, checkpoint, buffers)
    return flat.view(count, columns)


def _read(
    source: StoredTensor | None, first: int, count: int, checkpoint: Checkpoint, buffers: Buffers
) -> Tensor:
    assert source is not None and source.dtype is not None
    values = buffers.get("stored", count, source.dtype)
    start = source.start + first * source.dtype.itemsize
    read_into(checkpoint.descriptor(source.file), memory_of(values), start)
    return values


def _store(task: Task, merged: Tensor, first: int, output: OutputFiles, buffers: Buffers) -> int:
    """Round, check and write the rows of the tensor from ``first`` on."""
    dtype = DTYPES[task.output.code]
    rounded = merged
    if merged.dtype != dtype:
        rounded = buffers.get("rounded", merged.numel(), dtype).view(merged.shape)
        rounded.copy_(merged)
    changed = bool(task.updates or task.rows) or task.given is not None
    if not is_finite(rounded) and (changed or is_finite(merged)):
        raise not_finite(task.name, dtype, changed)
    return output.write(task.name, rounded, first * merged.shape[1])
