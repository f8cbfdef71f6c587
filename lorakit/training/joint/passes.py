"""One step of several members: passes that they share, then each one's update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import Interrupted
from lorakit.pipeline.task_data import Say
from lorakit.training.build import Objective
from lorakit.training.engine import StepResult
from lorakit.training.engine.eager import EagerEngine
from lorakit.training.joint.layout import join
from lorakit.training.joint.member_random import MemberDropout, MemberRandom
from lorakit.training.joint.trunk import Trunk
from lorakit.training.loop import StepRequest

#: On the CPU, batches whose lengths differ more than this are not padded to one length.
_LEAST_FILL = 0.8


@dataclass(frozen=True)
class Part:
    """What a member takes part in a pass with."""

    engine: EagerEngine
    objective: Objective
    random: MemberRandom


class JointPasses:
    """Computes the steps of ``parts``, the members, by their number. ``objective`` is that of the
    shared model in ``trunk``, ``pad_id`` the padding token."""

    def __init__(
        self, trunk: Trunk, objective: Any, parts: Mapping[int, Part], pad_id: int, say: Say
    ) -> None:
        self._trunk, self._objective = trunk, objective
        self._parts = dict(parts)
        self._pad_id, self._say = pad_id, say
        self._most = len(parts)
        self._objective.train()

    def drop(self, member: int) -> None:
        """Forget a member that takes no further steps."""
        self._trunk.drop(member)
        del self._parts[member]

    def take(self, requests: Mapping[int, StepRequest]) -> dict[int, StepResult | Exception]:
        """Take a step of each member; an error is that of the member that caused it."""
        members = list(requests)
        results: dict[int, StepResult | Exception] = {}
        for start in range(0, len(members), self._most):
            some = {member: requests[member] for member in members[start : start + self._most]}
            results |= self._take(some)
        return results

    def _take(self, requests: Mapping[int, StepRequest]) -> dict[int, StepResult | Exception]:
        drawn = {member: self._parts[member].random.drawn for member in requests}
        try:
            losses = self._losses(requests)
        except Interrupted:
            raise
        except Exception as error:
            for member in requests:
                self._parts[member].engine.discard_gradients()
                self._parts[member].random.drawn = drawn[member]
            if len(requests) == 1:
                return dict.fromkeys(requests, error)
            return self._apart(requests, error)
        return {member: self._finish(member, losses[member], requests[member]) for member in losses}

    def _apart(
        self, requests: Mapping[int, StepRequest], error: Exception
    ) -> dict[int, StepResult | Exception]:
        """Take the steps in two parts, after one of all of them has failed."""
        half = (len(requests) + 1) // 2
        if isinstance(error, torch.OutOfMemoryError) and half < self._most:
            self._most = half
            self._say(f"out of memory: from now on, passes have at most {half} members")
        members = list(requests)
        first = {member: requests[member] for member in members[:half]}
        return self._take(first) | self._take({m: requests[m] for m in members[half:]})

    def _finish(
        self, member: int, losses: Sequence[Tensor], request: StepRequest
    ) -> StepResult | Exception:
        try:
            return self._parts[member].engine.finish_step(losses, _count(request))
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
                found = self._pass(
                    {m: left[m] for m in members}, {m: 1 / _count(requests[m]) for m in members}
                )
                for member, loss in zip(members, found, strict=True):
                    losses[member].append(loss)
        return losses

    def _groups(self, batches: Mapping[int, Any]) -> list[list[int]]:
        """Members whose batches are padded to one length: all of them on a GPU, where a larger pass
        is hardly slower."""
        if self._device.type != "cpu":
            return [sorted(batches)]
        found: list[list[int]] = []
        longest = 0
        for member in sorted(batches, key=lambda m: -batches[m].input_ids.shape[1]):
            length = batches[member].input_ids.shape[1]
            if not found or length < _LEAST_FILL * longest:
                found.append([])
                longest = length
            found[-1].append(member)
        return [sorted(group) for group in found]

    def _pass(self, batches: Mapping[int, Any], factors: Mapping[int, float]) -> list[Tensor]:
        """Add the gradients of each member's loss times its factor; return these losses."""
        parts = [self._parts[member] for member in batches]
        joint = join(list(batches.values()), self._pad_id, self._longest_row)
        current = self._trunk.current
        current.members, current.layout = tuple(batches), joint.layout
        with ExitStack() as stack:
            current.dropout = None
            if self._device.type == "cpu":
                dropout = MemberDropout([part.random for part in parts], joint.layout)
                current.dropout = stack.enter_context(dropout)
            states = self._objective.states(joint.batch)
            losses = [
                part.objective.losses(joint.states(states, place), joint.own[place]) * factor
                for place, (part, factor) in enumerate(zip(parts, factors.values(), strict=True))
            ]
            total = torch.stack([loss for loss in losses if loss.requires_grad]).sum()
            total.backward()
        return [loss.detach() for loss in losses]

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._objective.model.device
        return device

    @property
    def _longest_row(self) -> int:
        return getattr(self._objective, "longest_row", 0) or 1


def _count(request: StepRequest) -> int:
    return request.loaded.loss_count
