"""Which members of a sweep train together, over one frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lorakit.errors import UserError
from lorakit.sweeps.members import Member
from lorakit.training.joint.joinable import can_join


@dataclass(frozen=True)
class Pass:
    """The numbers of members that train together; of a single one, the ``reason`` why it trains
    alone."""

    members: tuple[int, ...]
    reason: str | None = None


def make_passes(
    members: Sequence[Member], joint: Literal["auto"] | bool, most: int | None = None
) -> list[Pass]:
    """Divide ``members`` into passes of at most ``most`` that can join.

    Raises UserError if ``joint`` is true and a member cannot join the first.
    """
    if joint is False:
        return [Pass((at,), "joint is false") for at in range(len(members))]
    found: list[list[int]] = []
    reasons: dict[int, str] = {}
    for at, member in enumerate(members):
        own = can_join(member.recipe, member.recipe)
        others = [] if own else found
        for other in others:
            reason = can_join(members[other[0]].recipe, member.recipe)
            if reason is None:
                other.append(at)
                break
            reasons.setdefault(at, reason)
        else:
            found.append([at])
            reasons[at] = own or reasons.get(at, "no other member can join")
        if joint is True and at in reasons and (own or at):
            raise UserError(
                f"joint = true: member {member.name}: {reasons[at]}; allowed: auto, false"
            )
    return [
        Pass(tuple(part), reasons.get(part[0], f"max_joint is {most}") if len(part) == 1 else None)
        for numbers in found
        for part in _parts(numbers, most or len(members))
    ]


def _parts(numbers: Sequence[int], most: int) -> list[Sequence[int]]:
    """As few parts as possible, of about the same size."""
    count = -(-len(numbers) // most)
    size, larger = divmod(len(numbers), count)
    parts, start = [], 0
    for at in range(count):
        stop = start + size + (at < larger)
        parts.append(numbers[start:stop])
        start = stop
    return parts
