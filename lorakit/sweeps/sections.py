"""The keys of a sweep file, as pydantic models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lorakit.recipe.sections import OutputPath, PositiveInt, Section, Text

#: Recipe keys, ``SECTION.KEY``, and their values.
Settings = dict[str, Any]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class MemberSection(Section):
    """An entry of ``members``: a name, by default made of the settings, and recipe keys."""

    name: Text | None = None
    set: Annotated[Settings, Field(min_length=1)]


class SweepSection(Section):
    """A sweep: the members of ``grid``, the Cartesian product of its values, and ``members``.

    ``set`` are recipe keys of all members. ``trainable_parameters`` is a budget, which chooses the
    rank of each member. ``metric`` compares members; null is the task's main metric. ``joint``
    trains members together over one frozen base, at most ``max_joint`` at a time: ``auto`` where
    they can share one, ``true`` requires it of all. ``halving`` lists the points, as steps or as
    fractions of a run, at which members in the worse half stop; ``true`` is [0.25, 0.5].
    """

    recipe: Text
    output_dir: OutputPath
    set: Settings = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    members: list[MemberSection] = []
    trainable_parameters: PositiveInt | None = None
    metric: Text | None = None
    joint: Literal["auto"] | bool = "auto"
    max_joint: PositiveInt | None = None
    halving: bool | Annotated[list[Fraction | PositiveInt], Field(min_length=1)] = False

    @field_validator("halving")
    @classmethod
    def _in_order(cls, halving: Any) -> Any:
        points = halving if isinstance(halving, list) else []
        if len({isinstance(point, int) for point in points}) > 1:
            raise ValueError("mixes steps and fractions; allowed: one of them")
        if sorted(set(points)) != points:
            raise ValueError("is not in ascending order; allowed: each point after the one before")
        return halving


#: When members stop if ``halving`` is ``true``.
_DEFAULT_POINTS = (0.25, 0.5)


def halving_points(section: SweepSection) -> Sequence[float]:
    """The points of ``halving``, as steps or fractions of a run; empty without it."""
    if section.halving is True:
        return _DEFAULT_POINTS
    return section.halving or ()


def step_of(point: float, total_steps: int) -> int:
    """The step at which a run of ``total_steps`` reaches a point."""
    return point if isinstance(point, int) else math.ceil(point * total_steps)
