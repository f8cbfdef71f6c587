"""What a member takes part in joint passes with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorakit.training.build import Objective
from lorakit.training.engine.eager import EagerEngine, EncoderObjective
from lorakit.training.joint.member_random import MemberRandom


@dataclass(frozen=True)
class Part:
    """The member's engine, its objective, which computes losses from the states, and its random
    numbers."""

    engine: EagerEngine
    objective: Objective
    random: MemberRandom

    def cut(self, states: Tensor) -> Tensor:
        """The member's own outputs: members with heads for fewer classes than others have fewer."""
        if not isinstance(self.objective, EncoderObjective):
            return states
        return states[..., : self.objective.model.config.num_labels]
