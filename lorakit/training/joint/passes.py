"""One step of several members: passes that they share, then each one's update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import Interrupted
from lorakit.models.master_weights import base_dtype
from lorakit.notes import Say
from lorakit.training.engine import StepResult
from lorakit.training.engine.staging import counted_calls
from lorakit.training.joint.bank import Gradients, StagedStacks, match_strides
from lorakit.training.joint.batches import Joiner, JointBatch
from lorakit.training.joint.graphs import JointGraphs
from lorakit.training.joint.layers import JointLayer
from lorakit.training.joint.layout import NotSplit
from lorakit.training.joint.member_random import MemberDropout
from lorakit.training.joint.parts import Part, joint_losses, members_of_passes
from lorakit.training.joint.trunk import Trunk
from lorakit.training.memory import drop_frames, fewer_members
from lorakit.training.steps import StepRequest

#: On the CPU, batches whose lengths differ more than this are not padded to one length.
_LEAST_FILL = 0.8


class JointPasses:
    """Computes the steps of ``parts``, the members, by their number. ``objective`` is that of the
    shared model in ``trunk``; ``graphs`` is None on the CPU."""

    def __init__(
        self,
        trunk: Trunk,
        objective: Any,
        parts: dict[int, Part],
        joiner: Joiner,
        graphs: JointGraphs | None,
        say: Say,
    ) -> None:
        self._trunk, self._objective = trunk, objective
        self._parts = parts
        self._joiner, self._graphs, self._say = joiner, graphs, say
        self._most = 1 if trunk.separate else len(parts)
        self._gradients: Gradients | None = None
        self._dtype = base_dtype(objective.model)
        self._called_once: list[JointLayer] = []
        self._staged: StagedStacks | None = None
        self._passes: list[list[int]] = []
        # Members of which an eager pass has initialized libraries and allocated the gradients.
        self._warm: set[int] = set()
        self._objective.train()

    def drop(self, member: int) -> None:
        """Forget a member that takes no further steps."""
        self._trunk.drop(member)
        del self._parts[member]
        self._gradients = None

    def take(self, requests: Mapping[int, StepRequest]) -> dict[int, StepResult | Exception]:
        """Take a step of each member; an error is that of the member that caused it."""
        if self._gradients is None:
            self._stack()
        members = [member for member in self._trunk.order if member in requests]
        results: dict[int, StepResult | Exception] = {}
        while members:  # the number of members in a pass may become smaller
            some, members = members[: self._most], members[self._most :]
            results |= self._take({member: requests[member] for member in some})
        return results

    def _stack(self) -> None:
        """Stack the factors of the members that are left."""
        parts = {member: self._parts[member] for member in self._trunk.order}
        self._passes = [list(parts)] if self._graphs is None else members_of_passes(parts)
        stacks = self._trunk.stack(self._passes)
        for part in self._parts.values():
            match_strides(part.engine.optimizer)
        stacked = {id(p) for stack in stacks for p in stack.parameters()}
        trained = [p for part in self._parts.values() for p in part.engine.parameters.values()]
        for parameter in trained:
            parameter.grad = None
        self._gradients = Gradients(stacks, [p for p in trained if id(p) not in stacked])
        self._gradients_are_new()

    def _gradients_are_new(self) -> None:
        """Drop what refers to gradients that have been freed: graphs and staged factors."""
        self._warm.clear()
        if self._staged is not None:
            self._staged.release()
            self._staged = None
        if self._graphs is not None:
            self._graphs.forget()

    def _take(self, requests: Mapping[int, StepRequest]) -> dict[int, StepResult | Exception]:
        assert self._gradients is not None
        drawn = {member: self._parts[member].random.drawn for member in requests}
        try:
            losses = self._losses(requests)
        except Interrupted:
            raise
        except Exception as error:
            failure = error
        else:
            return self._update(requests, losses)
        self._gradients.clear(in_place=False)
        self._gradients_are_new()
        for member in requests:
            self._parts[member].random.drawn = drawn[member]
        if len(requests) > 1 or isinstance(failure, torch.OutOfMemoryError):
            drop_frames(failure)
        if len(requests) == 1:
            return dict.fromkeys(requests, failure)
        return self._apart(requests, failure)

    def _update(
        self, requests: Mapping[int, StepRequest], losses: Mapping[int, Sequence[Tensor]]
    ) -> dict[int, StepResult | Exception]:
        """Change the weights of the members whose passes gave ``losses``."""
        assert self._gradients is not None
        self._gradients.share()
        scalars = self._updated(requests)
        results = {
            member: self._finish(member, own, requests[member], scalars.get(member))
            for member, own in losses.items()
        }
        self._gradients.clear(in_place=self._graphs is not None)
        self._warm.update(requests)
        return results

    def _apart(
        self, requests: Mapping[int, StepRequest], error: Exception
    ) -> dict[int, StepResult | Exception]:
        """Take the steps in two parts, after one of all of them has failed."""
        half = (len(requests) + 1) // 2
        if isinstance(error, NotSplit):
            self._trunk.separate, self._most, half = True, 1, 1
            self._say("members take their steps one after another: the model mixes their rows")
        if isinstance(error, torch.OutOfMemoryError) and half < self._most:
            self._most = half
            self._say(fewer_members("training", half))
        members = list(requests)
        first = {member: requests[member] for member in members[:half]}
        rest = {member: requests[member] for member in members[half:]}
        return self._take(first) | self.take(rest)

    def _updated(self, requests: Mapping[int, StepRequest]) -> dict[int, list[Tensor]]:
        """Update the members whose updates are replayed; return what each one's returned."""
        if self._graphs is None or not requests.keys() <= self._warm:
            return {}
        return self._graphs.update({member: self._parts[member].engine for member in requests})

    def _finish(
        self,
        member: int,
        losses: Sequence[Tensor],
        request: StepRequest,
        scalars: Sequence[Tensor] | None,
    ) -> StepResult | Exception:
        try:
            return self._parts[member].engine.finish_step(losses, _count(request), scalars)
        except Interrupted:
            raise
        except Exception as error:
            return error

    def _losses(self, requests: Mapping[int, StepRequest]) -> dict[int, list[Tensor]]:
        """Run the passes of all micro-batches; return their losses, divided by the step's count."""
        losses: dict[int, list[Tensor]] = {member: [] for member in requests}
        batches = {member: request.loaded.micro_batches for member, request in requests.items()}
        for index in range(max(map(len, batches.values()))):
            left = {member: own[index] for member, own in batches.items() if index < len(own)}
            for members in self._groups(left):
                factors = [1 / _count(requests[member]) for member in members]
                joint = self._joiner.join([left[member] for member in members], factors)
                for member, loss in zip(members, self._run(members, joint).unbind(0), strict=True):
                    losses[member].append(loss)
        return losses

    def _groups(self, batches: Mapping[int, Any]) -> list[list[int]]:
        """Members whose batches are padded to one length."""
        if self._graphs is not None:
            groups = [[m for m in members if m in batches] for members in self._passes]
            return [members for members in groups if members]
        found: list[list[int]] = []
        longest = 0
        for member in sorted(batches, key=lambda m: -batches[m].input_ids.shape[1]):
            length = batches[member].input_ids.shape[1]
            if not found or length < _LEAST_FILL * longest:
                found.append([])
                longest = length
            found[-1].append(member)
        return [[member for member in batches if member in group] for group in found]

    def _run(self, members: Sequence[int], joint: JointBatch) -> Tensor:
        current = self._trunk.current
        current.members, current.layout, current.dropout = tuple(members), joint.layout, None
        if self._graphs is None:
            return self._pass(joint)
        if not self._warm.issuperset(members):
            return self._first_pass(joint.to(self._objective.model.device))
        is_half = self._dtype != torch.float32
        if self._staged is None and is_half and self._warm.issuperset(self._parts):
            stacks = [stack for layer in self._called_once for stack in layer.stacks]
            self._staged = StagedStacks(stacks, self._dtype)
        return self._graphs.run(members, joint, self._pass)

    def _first_pass(self, joint: JointBatch) -> Tensor:
        """A pass of members that are not warm."""
        layers = self._trunk.layers
        with counted_calls(layers) as calls:
            losses = self._pass(joint)
        self._called_once = [x for x, count in zip(layers, calls, strict=True) if count == 1]
        return losses

    def _pass(self, joint: JointBatch) -> Tensor:
        """Add the gradients of the members' losses times their factors; return these (members,)."""
        current = self._trunk.current
        parts = [self._parts[member] for member in current.members]
        with ExitStack() as contexts:
            if self._staged is not None:
                contexts.enter_context(self._staged.training(current.members))
            if self._graphs is None:
                dropout = MemberDropout([part.random for part in parts], joint.layout)
                current.dropout = contexts.enter_context(dropout)
            states = self._objective.states(joint.batch)
            scaled = joint_losses(parts, joint, states) * joint.factors
            scaled.sum().backward()
        return scaled.detach()


def _count(request: StepRequest) -> float:
    return request.loaded.loss_count
