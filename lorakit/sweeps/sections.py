"""The keys of a sweep file, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lorakit.recipe.sections import PositiveInt, Section, Text

#: Recipe keys, ``SECTION.KEY``, and their values.
Settings = dict[str, Any]


class MemberSection(Section):
    """An entry of ``members``: a name, by default made of the settings, and recipe keys."""

    name: Text | None = None
    set: Annotated[Settings, Field(min_length=1)]


class SweepSection(Section):
    """A sweep: the members of ``grid``, the Cartesian product of its values, and ``members``.

    ``set`` are recipe keys of all members. ``trainable_parameters`` is a budget, which chooses the
    rank of each member. ``metric`` compares members; null is the task's main metric. ``joint``
    trains members together over one frozen base, at most ``max_joint`` at a time: ``auto`` where
    they can share one, ``true`` requires it of all.
    """

    recipe: Text
    output_dir: Text
    set: Settings = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    members: list[MemberSection] = []
    trainable_parameters: PositiveInt | None = None
    metric: Text | None = None
    joint: Literal["auto"] | bool = "auto"
    max_joint: PositiveInt | None = None
