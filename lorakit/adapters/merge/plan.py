"""Plan the tensors of the merged model and their sources.

The base's files determine the output: every stored tensor is written again, under the same name.
Tied weights are written separately only if they differ after the merge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from lorakit.adapters.merge.checkpoint import (
    CODES,
    DTYPES,
    Checkpoint,
    OutputTensor,
    StoredTensor,
)
from lorakit.adapters.merge.ties import all_given, find_shared, is_untied, new_names
from lorakit.adapters.merge.updates import Group, ResolvedBase, Update, merged_sum
from lorakit.adapters.peft.read import is_finite
from lorakit.adapters.peft.tokens import StoredRows
from lorakit.errors import AdapterError


@dataclass(frozen=True)
class Task:
    """One tensor of the output: the adapter's ``given`` value, or the base's ``source`` with
    ``updates`` folded in or ``rows`` replaced. It goes to the file of the tensor ``stored``."""

    name: str
    output: OutputTensor
    stored: str | None = None
    source: StoredTensor | None = None
    given: Tensor | None = None
    updates: Sequence[Update] = ()
    rows: StoredRows | None = None

    @property
    def is_copy(self) -> bool:
        """Whether the base's bytes are copied unchanged."""
        same = self.source is not None and self.source.code == self.output.code
        return same and self.given is None and not self.updates and self.rows is None


@dataclass(frozen=True)
class GroupTask:
    """A group with changed parameters. ``outputs``: stored name -> the tensor written for it."""

    group: Group
    outputs: Mapping[str, OutputTensor]
    updates: Mapping[str, Sequence[Update]]
    given: Mapping[str, Tensor]


@dataclass(frozen=True)
class MergePlan:
    """``outputs`` are in the order of the base's files, and produced by ``tasks`` and ``groups``.

    ``stored``: output -> the stored tensor that it replaces, if any; ``kept``: stored tensors that
    the class does not read; ``untied``: whether tied embeddings become two matrices; ``dtype``: the
    one of most values.
    """

    outputs: Mapping[str, OutputTensor]
    tasks: Sequence[Task]
    groups: Sequence[GroupTask]
    stored: Mapping[str, str]
    kept: tuple[str, ...]
    untied: bool
    dtype: str
    merged_modules: int
    replaced_tensors: int

    @property
    def size_bytes(self) -> int:
        return sum(output.size_bytes for output in self.outputs.values())


def plan_merge(base: ResolvedBase, checkpoint: Checkpoint, dtype: str | None) -> MergePlan:
    """Plan the output, in ``dtype`` (default: each tensor's own).

    Raises AdapterError for a quantized weight that the adapter changes, and for tied weights that
    it makes different if the class cannot store them separately.
    """
    by_name: dict[str, str] = {}
    for stored, name in base.plain.items():
        by_name.setdefault(name, stored)
    shared = find_shared(base, checkpoint, by_name)
    given = all_given(base, shared)
    untied = [
        names for names in shared.together if is_untied(names, base.fully_trained, base.updates)
    ]
    if impossible := [names for names in untied if not base.can_untie(names)]:
        what = f"{impossible[0][0]}: {base.class_name}"
        raise AdapterError(f"{what} cannot store these tied weights as separate tensors")
    changed = {*base.updates, *given}
    groups = [group for group in base.groups if changed & set(group.targets)]
    converted = {source for group in groups for source in group.sources}
    main = dtype or _main_dtype(checkpoint)
    stored_tasks = _stored_tasks(base, checkpoint, by_name, given, dtype)
    new_tasks = [
        _new_task(name, source, base, checkpoint, given, dtype, main)
        for name, source in new_names(base, shared, untied, by_name, given).items()
    ]
    tasks = [task for task in stored_tasks if task.stored not in converted] + new_tasks
    for task in tasks:
        _check_float(task.name, task.source, bool(task.updates) or task.rows is not None)
    every = (*stored_tasks, *new_tasks)
    used = {*base.plain, *(source for group in base.groups for source in group.sources)}
    return MergePlan(
        outputs={task.name: task.output for task in every},
        tasks=tasks,
        groups=[_group_task(group, checkpoint, base, given, dtype) for group in groups],
        stored={task.name: task.stored for task in every if task.stored is not None},
        kept=tuple(sorted(set(checkpoint.tensors) - used)),
        untied=bool(untied) or shared.stored_apart,
        dtype=main,
        merged_modules=sum(not name.endswith(".bias") for name in base.updates),
        replaced_tensors=len(given) + sum(task.rows is not None for task in tasks),
    )


def check_finite(name: str, merged: Tensor) -> None:
    """Raise AdapterError if ``merged`` has NaN or infinite values."""
    if not is_finite(merged):
        raise not_finite(name, merged.dtype)


def not_finite(name: str, dtype: torch.dtype, changed: bool = True) -> AdapterError:
    """The error for a tensor with such values; ``changed``: whether the adapter changes it."""
    text = str(dtype).removeprefix("torch.")
    reason = (
        "either the base has such values, or the sum exceeds the range of the dtype"
        if changed
        else "the base's values exceed the range of the dtype"
    )
    return AdapterError(
        f"{name}: NaN or infinite values in {text} after the merge: {reason}; hint: dtype float32 "
        "has a larger range"
    )


def _stored_tasks(
    base: ResolvedBase,
    checkpoint: Checkpoint,
    by_name: Mapping[str, str],
    given: Mapping[str, Tensor],
    dtype: str | None,
) -> list[Task]:
    """One task for each stored tensor, in the order of the base's files."""
    tasks: dict[str, Task] = {}
    for stored, tensor in checkpoint.tensors.items():
        name = base.plain.get(stored)
        if name is not None and by_name[name] != stored:  # read, then overwritten by another
            name = None
        task = _stored_task(stored, tensor, name, base, given, dtype)
        if task.name in tasks:
            raise AdapterError(f"base: {checkpoint.directory}: two tensors become {task.name}")
        tasks[task.name] = task
    return list(tasks.values())


def _stored_task(
    stored: str,
    tensor: StoredTensor,
    name: str | None,
    base: ResolvedBase,
    given: Mapping[str, Tensor],
    dtype: str | None,
) -> Task:
    """``name`` is the class's name of the tensor, None if it does not read it."""
    output = _output(tensor, dtype)
    if name is None:
        return Task(stored, output, stored, tensor)
    value = given.get(name)
    if value is not None and tuple(value.shape) != tensor.shape:
        # A head for another number of labels.
        output = OutputTensor.of(value.shape, DTYPES[output.code])
    if (rows := base.rows.get(name)) is not None:
        count = max(tensor.shape[0], *(index + 1 for index in rows.indices))
        output = OutputTensor.of((count, *tensor.shape[1:]), DTYPES[output.code])
    written = stored if base.architecture is None else base.stored_name(name)
    return Task(written, output, stored, tensor, value, base.updates.get(name, ()), rows)


def _new_task(
    name: str,
    source: str | None,
    base: ResolvedBase,
    checkpoint: Checkpoint,
    given: Mapping[str, Tensor],
    dtype: str | None,
    main: str,
) -> Task:
    """A parameter that is not stored, but tied to the stored ``source`` or given by the adapter."""
    tensor = checkpoint.tensors[source] if source is not None else None
    code = tensor.code if tensor and not dtype else dtype_code(dtype or main)
    value = given.get(name)
    shape = tuple(value.shape) if value is not None else base.shapes[name]
    output = OutputTensor.of(shape, DTYPES[code])
    return Task(base.stored_name(name), output, source, tensor, value, base.updates.get(name, ()))


def _group_task(
    group: Group,
    checkpoint: Checkpoint,
    base: ResolvedBase,
    given: Mapping[str, Tensor],
    dtype: str | None,
) -> GroupTask:
    for source in group.sources:
        _check_float(source, checkpoint.tensors[source], True)
    return GroupTask(
        group,
        {source: _output(checkpoint.tensors[source], dtype) for source in group.sources},
        {name: base.updates[name] for name in group.targets if name in base.updates},
        {name: given[name] for name in group.targets if name in given},
    )


def _check_float(name: str, source: StoredTensor | None, changes: bool) -> None:
    if changes and source is not None and not source.is_float:
        raise AdapterError(
            f"base: {source.file}: {name} is {source.code}: cannot merge into a quantized base; "
            "hint: merge into the original weights"
        )


def _output(stored: StoredTensor, dtype: str | None) -> OutputTensor:
    if dtype is None or not stored.is_float:
        return OutputTensor.like(stored)
    return OutputTensor.of(stored.shape, DTYPES[dtype_code(dtype)])


def dtype_code(dtype: str) -> str:
    """The dtype's code in safetensors files (``BF16``)."""
    return CODES[getattr(torch, dtype)]


def _main_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most of the base's values."""
    count: Counter[torch.dtype] = Counter()
    for stored in checkpoint.tensors.values():
        if stored.is_float and stored.dtype is not None:
            count[stored.dtype] += stored.parameters
    return str(count.most_common(1)[0][0]).removeprefix("torch.") if count else "float32"


def group_values(task: GroupTask, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Compute the stored tensors of a group: merged in float32, and rounded once."""
    values = {source: checkpoint.read(source) for source in task.outputs}
    stored = reduce(torch.promote_types, (value.dtype for value in values.values()))
    own = {name: DTYPES[output.code] for name, output in task.outputs.items()}
    dtype = reduce(torch.promote_types, own.values())

    def finish(name: str, W: Tensor) -> Tensor:
        if name in task.given:
            W = task.given[name]
        elif name in task.updates:
            W = merged_sum(task.updates[name], W)
        W = W.to(dtype)
        check_finite(name, W)
        return W

    values = {name: value.to(stored) for name, value in values.items()}
    made = task.group.converted(values, finish)
    return {name: value.to(own[name]) for name, value in made.items()}
