"""Evaluations of several members at once, where they measure the same rows at the same step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lorakit.data.collate import CausalBatch, EncoderBatch
from lorakit.evaluation.scorer import Scorer
from lorakit.models.causal import state_losses
from lorakit.notes import Say
from lorakit.training.joint.batches import JointBatch
from lorakit.training.joint.layout import Layout
from lorakit.training.joint.parts import Part
from lorakit.training.joint.trunk import Trunk
from lorakit.training.memory import drop_frames, fewer_members


class JointEvaluations:
    """Measures a batch for all members that will evaluate the same rows, when the first of them
    asks for it, and keeps the results until the others do.

    ``partners(member)`` returns the members, ``member`` included, that are about to evaluate the
    same batches with their current weights. If the memory is not enough for all of them, fewer are
    measured at once from then on, which ``say`` gets to know.
    """

    def __init__(
        self,
        trunk: Trunk,
        objective: Any,
        parts: Mapping[int, Part],
        partners: Callable[[int], Iterable[int]],
        say: Say,
    ) -> None:
        self._trunk, self._objective, self._parts = trunk, objective, parts
        self._partners, self._say = partners, say
        self._most = len(trunk.order)
        self._results: dict[int, list[Tensor]] = {}
        self._started: set[int] = set()

    def forget(self) -> None:
        """Drop all results: the weights change."""
        self._results.clear()
        self._started.clear()

    def scorer(self, member: int) -> Scorer | None:
        """What an evaluation of the member measures its batches with. None for a second one after
        a step, which may be of other weights."""
        if member in self._started:
            return None
        self._started.add(member)
        return _MemberScorer(self, member)

    def result(self, member: int, index: int, batch: EncoderBatch | CausalBatch) -> Tensor:
        """What the member measures of its batch number ``index``."""
        own = self._results.setdefault(member, [])
        while index == len(own):
            members = self._waiting(member, index)
            try:
                found = self._measure(members, batch)
            except torch.OutOfMemoryError as error:
                if len(members) == 1:
                    raise
                drop_frames(error)
                self._most = (len(members) + 1) // 2
                self._say(fewer_members("evaluating", self._most))
            else:
                for each, result in zip(members, found, strict=True):
                    self._results[each].append(result)
        return own[index]

    def _waiting(self, member: int, index: int) -> list[int]:
        """The member and as many others as may be measured with it, in the trunk's order."""
        others = [] if self._trunk.separate else self._partners(member)
        partners = {*others} - {member}
        waiting = [
            each
            for each in self._trunk.order
            if each in partners and len(self._results.setdefault(each, [])) == index
        ]
        chosen = {member, *waiting[: self._most - 1]}
        return [each for each in self._trunk.order if each in chosen]

    def _measure(self, members: list[int], batch: EncoderBatch | CausalBatch) -> list[Tensor]:
        parts = [self._parts[member] for member in members]
        joint = _repeated(batch, len(members))
        current = self._trunk.current
        current.members, current.layout, current.dropout = tuple(members), joint.layout, None
        with _evaluation_mode(self._objective), self._trunk.evaluated(members):
            states = self._objective.states(joint.batch)
        found = []
        for place, part in enumerate(parts):
            own = part.cut(joint.states(states, place))
            if isinstance(batch, CausalBatch):
                model, split = part.objective.model, part.objective.parts
                assert split is not None
                indices, targets = batch.loss_indices, batch.targets
                own = state_losses(model, split, own, indices, targets, weights=batch.weights)
            found.append(own)
        return found


@dataclass
class _MemberScorer:
    evaluations: JointEvaluations
    member: int
    measured: int = field(default=0)

    def logits(self, batch: EncoderBatch) -> Tensor:
        return self._next(batch)

    def token_loss(self, batch: CausalBatch) -> Tensor:
        return self._next(batch)

    def _next(self, batch: EncoderBatch | CausalBatch) -> Tensor:
        self.measured += 1
        return self.evaluations.result(self.member, self.measured - 1, batch)


@contextmanager
def _evaluation_mode(objective: Any) -> Iterator[None]:
    objective.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        objective.train()


def _repeated(batch: EncoderBatch | CausalBatch, members: int) -> JointBatch:
    """The same batch for each member."""
    rows, length = batch.input_ids.shape
    layout = Layout(((rows, length),) * members, rows, length)
    factors = torch.ones(members)
    if isinstance(batch, CausalBatch):
        joint: Any = replace(batch, input_ids=batch.input_ids.repeat(members, 1))
        return JointBatch(joint, {}, factors, (len(batch.targets),) * members, layout)
    tensors: dict[str, Any] = {
        name: tensor.repeat(members, 1) for name, tensor in batch.model_inputs().items()
    }
    labels = batch.labels.expand(members, *batch.labels.shape)
    joint = replace(batch, **tensors)
    return JointBatch(joint, {"labels": labels}, factors, (rows,) * members, layout)
