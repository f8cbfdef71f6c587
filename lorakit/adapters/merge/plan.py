"""Weights that a class shares (tied embeddings): which the checkpoint shares too, and which a merge
makes different.

Which tensors the merged model has, and where each comes from. What is on disk decides: every
tensor that the base stores is written again, under its own name.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from lorakit.adapters.merge.checkpoint import CODES, DTYPES, Checkpoint, StoredTensor
from lorakit.adapters.merge.shards import OutputTensor
from lorakit.adapters.merge.updates import Group, Held, LowRank, Ties, Update, merged_sum
from lorakit.adapters.peft.read import is_finite
from lorakit.errors import AdapterError


@dataclass(frozen=True)
class Shared:
    """``together``: names of one parameter that are one in the checkpoint, too;
    ``stored_apart``: others are stored with different values, which transformers then keeps."""

    together: Ties
    stored_apart: bool


def find_shared(held: Held, checkpoint: Checkpoint, by_name: Mapping[str, str]) -> Shared:
    """Which of the class's ties the checkpoint has too; ``by_name``: the class's name -> stored."""
    together: list[Sequence[str]] = []
    apart = False
    for names in held.ties:
        stored = [by_name[name] for name in names if name in by_name]
        if len(stored) > 1 and not all(_equal(checkpoint, stored[0], s) for s in stored[1:]):
            apart = True
        else:
            together.append(names)
    return Shared(together, apart)


def all_given(held: Held, shared: Shared) -> dict[str, Tensor]:
    """What the adapter has whole; PEFT's copy of a base weight stands for all that share it."""
    given = held.given
    for names in shared.together:
        for name in names if (found := set(names) & set(held.base)) else ():
            given.setdefault(name, given[min(found)])
    return given


def is_parted(
    names: Sequence[str],
    whole: Mapping[str, Tensor],
    adapted: Collection[str],
) -> bool:
    """Whether weights that the base shares differ after the merge."""
    given = [name for name in names if name in whole]
    if any(name in adapted for name in names):
        return True
    same = len(given) == len(names) and all(whole[n].equal(whole[given[0]]) for n in given)
    return bool(given) and not same


def new_names(
    held: Held,
    shared: Shared,
    parted: Ties,
    by_name: Mapping[str, str],
    given: Mapping[str, Tensor],
) -> dict[str, str | None]:
    """The class's names that are written and not stored -> the stored tensor they shared."""
    new: dict[str, str | None] = {}
    one: set[str] = set()
    for names in shared.together:
        source = next((by_name[name] for name in names if name in by_name), None)
        if names in parted:
            new |= {name: source for name in names if name not in by_name}
            continue
        one |= set(names)
        if source is None and names[0] in given:
            new[names[0]] = None
    in_groups = {name for group in held.groups for name in group.targets}
    absent = [name for name in given if name not in by_name and name not in one | in_groups]
    return dict.fromkeys(absent) | new


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two stored tensors hold the same values; bytes are compared piece by piece."""
    a, b = checkpoint.tensors[one], checkpoint.tensors[other]
    if (a.shape, a.code) != (b.shape, b.code):
        return False
    step = 2**22
    for at in range(0, a.size_bytes, step):
        count = min(step, a.size_bytes - at)
        pieces = [os.pread(checkpoint.descriptor(t.file), count, t.start + at) for t in (a, b)]
        if pieces[0] != pieces[1]:
            return False
    return True


@dataclass(frozen=True)
class Task:
    """One tensor of the output: the adapter's ``given`` one, or the base's ``source`` with
    ``updates`` folded in. ``stored`` is the base's tensor in whose file it goes."""

    name: str
    output: OutputTensor
    stored: str | None = None
    source: StoredTensor | None = None
    given: Tensor | None = None
    updates: Sequence[Update | LowRank] = ()

    @property
    def is_copy(self) -> bool:
        """Whether the base's bytes are written as they are."""
        same = self.source is not None and self.source.code == self.output.code
        return same and self.given is None and not self.updates


@dataclass(frozen=True)
class GroupTask:
    """A group some of whose tensors change; ``outputs``: stored name -> what is written for it."""

    group: Group
    outputs: Mapping[str, OutputTensor]
    updates: Mapping[str, Sequence[Update | LowRank]]
    given: Mapping[str, Tensor]


@dataclass(frozen=True)
class MergePlan:
    """``outputs`` in the order of the base's files; each is made by one of ``tasks`` or ``groups``.
    ``stored`` is the base's tensor that each stands for, if any. ``kept`` are the base's tensors
    that the loaded class does not hold; ``untied``: tied embeddings are two matrices; ``dtype`` is
    that of most values."""

    outputs: Mapping[str, OutputTensor]
    tasks: Sequence[Task]
    groups: Sequence[GroupTask]
    stored: Mapping[str, str]
    kept: tuple[str, ...]
    untied: bool
    dtype: str
    merged_modules: int
    replaced_tensors: int


def plan_merge(held: Held, checkpoint: Checkpoint, dtype: str | None) -> MergePlan:
    """Plan the output, in ``dtype`` (default: each tensor's own).

    Raises AdapterError for a quantised weight that the adapter changes, and for shared weights that
    it makes different where the class cannot hold them apart.
    """
    by_name: dict[str, str] = {}
    for stored, name in held.plain.items():
        by_name.setdefault(name, stored)
    shared = find_shared(held, checkpoint, by_name)
    given = all_given(held, shared)
    parted = [names for names in shared.together if is_parted(names, held.whole, held.updates)]
    if impossible := [names for names in parted if not held.can_part(names)]:
        raise AdapterError(
            f"{impossible[0][0]}: {held.class_name} cannot store these shared weights as separate "
            "tensors"
        )
    changed = {*held.updates, *given}
    converted = [group for group in held.groups if changed & set(group.targets)]
    own_task = {source for group in converted for source in group.sources}
    main = dtype or _main_dtype(checkpoint)
    tasks: list[Task] = []
    outputs: dict[str, OutputTensor] = {}
    stands_for: dict[str, str] = {}
    for stored, tensor in checkpoint.tensors.items():
        found = held.plain.get(stored)
        task = _stored_task(stored, tensor, found if by_name.get(found or "") == stored else None,
                            held, given, dtype)  # fmt: skip
        if task.name in outputs:
            raise AdapterError(f"base: {checkpoint.directory}: two tensors become {task.name}")
        if stored not in own_task:
            tasks.append(task)
        outputs[task.name] = task.output
        stands_for[task.name] = stored
    for name, source in new_names(held, shared, parted, by_name, given).items():
        origin = checkpoint.tensors[source] if source is not None else None
        code = dtype_code(dtype) if dtype else (origin.code if origin else dtype_code(main))
        task = _new_task(name, source, origin, code, held, given)
        tasks.append(task)
        outputs[task.name] = task.output
        if source is not None:
            stands_for[task.name] = source
    for task in tasks:
        _check_float(task.name, task.source, bool(task.updates))
    used = {*held.plain, *(source for group in held.groups for source in group.sources)}
    return MergePlan(
        outputs=outputs,
        tasks=tasks,
        groups=[_group_task(group, checkpoint, held, given, dtype) for group in converted],
        stored=stands_for,
        kept=tuple(sorted(set(checkpoint.tensors) - used)),
        untied=bool(parted) or shared.stored_apart,
        dtype=main,
        merged_modules=len(held.updates),
        replaced_tensors=len(given),
    )


def check_finite(name: str, merged: Tensor) -> None:
    """Raise AdapterError for a tensor that no model should be written with."""
    if not is_finite(merged):
        raise not_finite(name, merged.dtype)


def not_finite(name: str, dtype: torch.dtype, changed: bool = True) -> AdapterError:
    """``changed``: whether the adapter does something to the tensor."""
    text = str(dtype).removeprefix("torch.")
    reason = (
        "either the base's own values are, or the sum is too large for the dtype"
        if changed
        else "the base's own values are too large for the dtype"
    )
    return AdapterError(
        f"{name}: NaN or infinite in the merged {text}: {reason} (dtype float32 holds more)"
    )


def _stored_task(
    stored: str,
    tensor: StoredTensor,
    name: str | None,
    held: Held,
    given: Mapping[str, Tensor],
    dtype: str | None,
) -> Task:
    """``name`` is the class's, None for what it does not read."""
    output = _output(tensor, dtype)
    if name is None:
        return Task(stored, output, stored, tensor)
    value = given.get(name)
    if value is not None and tuple(value.shape) != tensor.shape:
        # A head for another number of labels.
        output = OutputTensor.of(value.shape, DTYPES[output.code])
    written = stored if held.architecture is None else held.stored_name(name)
    return Task(written, output, stored, tensor, value, held.updates.get(name, ()))


def _new_task(
    name: str,
    stored: str | None,
    source: StoredTensor | None,
    code: str,
    held: Held,
    given: Mapping[str, Tensor],
) -> Task:
    value = given.get(name)
    shape = tuple(value.shape) if value is not None else held.shapes[name]
    output = OutputTensor.of(shape, DTYPES[code])
    written = held.stored_name(name)
    return Task(written, output, stored, source, value, held.updates.get(name, ()))


def _group_task(
    group: Group,
    checkpoint: Checkpoint,
    held: Held,
    given: Mapping[str, Tensor],
    dtype: str | None,
) -> GroupTask:
    for source in group.sources:
        _check_float(source, checkpoint.tensors[source], True)
    return GroupTask(
        group,
        {source: _output(checkpoint.tensors[source], dtype) for source in group.sources},
        {name: held.updates[name] for name in group.targets if name in held.updates},
        {name: given[name] for name in group.targets if name in given},
    )


def _check_float(name: str, source: StoredTensor | None, changes: bool) -> None:
    if changes and source is not None and not source.is_float:
        raise AdapterError(
            f"base: {source.file}: {name} is {source.code}: a quantised base cannot be merged "
            "into; merge into the original weights"
        )


def _output(stored: StoredTensor, dtype: str | None) -> OutputTensor:
    if dtype is None or not stored.is_float:
        return OutputTensor.like(stored)
    return OutputTensor.of(stored.shape, DTYPES[dtype_code(dtype)])


def dtype_code(dtype: str) -> str:
    """safetensors' name of ``bfloat16`` and the like."""
    return CODES[getattr(torch, dtype)]


def _main_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most of the base's values."""
    count: Counter[torch.dtype] = Counter()
    for stored in checkpoint.tensors.values():
        if stored.is_float and stored.dtype is not None:
            count[stored.dtype] += stored.parameters
    return str(count.most_common(1)[0][0]).removeprefix("torch.") if count else "float32"


def group_values(task: GroupTask, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What is written for the stored tensors of a group: merged in float32, rounded once."""
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
