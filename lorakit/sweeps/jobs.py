"""Which members of a sweep train together, over one frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from lorakit.distributed.group import rank_and_world_size
from lorakit.errors import UserError
from lorakit.models.load import default_device
from lorakit.recipe.sections import Recipe
from lorakit.sweeps.members import Member
from lorakit.sweeps.sections import SweepSection
from lorakit.training.joint import can_join, members_that_fit


@dataclass(frozen=True)
class Job:
    """The numbers of members that train together; of a single one, the ``reason`` why it trains
    alone."""

    members: tuple[int, ...]
    reason: str | None = None


def make_jobs(members: Sequence[Member], section: SweepSection) -> list[Job]:
    """Divide ``members`` into jobs of at most ``max_joint`` that can join; None is as many as the
    memory holds. If a launcher has started several processes, there is a job for each of them, as
    far as there are members.

    Raises UserError if ``joint`` is true and a member cannot join the first.
    """
    joint, most = section.joint, section.max_joint
    if joint is False:
        return [Job((at,), "joint is false") for at in range(len(members))]
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
    jobs = []
    for numbers in found:
        if len(numbers) == 1:
            jobs.append(Job(tuple(numbers), reasons[numbers[0]]))
            continue
        size = most or _that_fit([members[at].recipe for at in numbers])
        fit = f"only {size} {'fits' if size == 1 else 'fit'} in memory"
        alone = f"max_joint is {size}" if most else fit
        share = -(-len(members) // rank_and_world_size()[1])
        if share < size:
            size, alone = share, "the processes share the members"
        jobs += [
            Job(tuple(part), alone if len(part) == 1 else None) for part in _parts(numbers, size)
        ]
    return jobs


def _that_fit(recipes: Sequence[Recipe]) -> int:
    """How many of ``recipes`` the memory holds; those that fail do not count."""
    device = default_device()
    sound: dict[str, bool] = {}
    for recipe in recipes:
        adapter = recipe.adapter.model_dump_json()
        if adapter not in sound:
            sound[adapter] = False
            with suppress(UserError):  # which the member's run will raise, too
                members_that_fit([recipe], device)
                sound[adapter] = True
    left = [recipe for recipe in recipes if sound[recipe.adapter.model_dump_json()]]
    most = members_that_fit(left, device) if left else 0
    return len(recipes) if most == len(left) else most


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
