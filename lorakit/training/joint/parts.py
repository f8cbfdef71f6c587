"""What a member takes part in joint passes with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.data.collate import EncoderBatch
from lorakit.training.build import Objective
from lorakit.training.engine.eager import EagerEngine, EncoderObjective
from lorakit.training.joint.batches import JointBatch
from lorakit.training.joint.member_random import MemberRandom

#: A pass of fewer rows is hardly faster on a GPU.
LEAST_ROWS = 128


@dataclass(frozen=True)
class Part:
    """The member's engine, its objective, which computes losses from the states, and its random
    numbers. Members with the same number ``batches`` have the same, of ``rows`` rows; None if
    that varies."""

    engine: EagerEngine
    objective: Objective
    random: MemberRandom
    batches: int
    rows: int | None

    def cut(self, states: Tensor) -> Tensor:
        """The member's own outputs: members with heads for fewer classes than others have fewer."""
        if not isinstance(self.objective, EncoderObjective):
            return states
        return states[..., : self.objective.model.config.num_labels]


def members_of_passes(parts: Mapping[int, Part]) -> list[list[int]]:
    """Members with the same batches, whose lengths are the same. Others are padded to one length,
    which costs less than a pass of few rows."""

    def rows(members: Sequence[int]) -> int:
        return sum(parts[member].rows or 1 for member in members)

    groups: list[list[int]] = []
    for member, part in parts.items():
        joins = groups and (
            parts[groups[-1][-1]].batches == part.batches or rows(groups[-1]) < LEAST_ROWS
        )
        if not joins:
            groups.append([])
        groups[-1].append(member)
    if len(groups) > 1 and rows(groups[-1]) < LEAST_ROWS:
        groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def joint_losses(parts: Sequence[Part], joint: JointBatch, states: Tensor) -> Tensor:
    """The sum of each member's losses (members,), given the ``states`` of all: at once, if members
    with as many rows compute theirs in the same way."""
    first = parts[0].objective
    if isinstance(first, EncoderObjective) and _compute_alike(parts, joint):
        batch = EncoderBatch(joint.batch.input_ids, joint.losses["labels"].flatten(0, 1))
        own = first.losses(parts[0].cut(states), batch, "none")
        return own.view(len(parts), -1).sum(1)
    losses = [
        part.objective.losses(part.cut(joint.states(states, place)), joint.own(place))
        for place, part in enumerate(parts)
    ]
    return torch.stack(losses)


def _compute_alike(parts: Sequence[Part], joint: JointBatch) -> bool:
    settings = {
        part.objective.loss_settings
        for part in parts
        if isinstance(part.objective, EncoderObjective)
    }
    same_classes = joint.classes is None or len({*joint.classes}) == 1
    return len(settings) == 1 and {*joint.counts} == {joint.layout.rows} and same_classes
