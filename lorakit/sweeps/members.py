"""The members of a sweep: their names, settings and recipes."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from lorakit.recipe.check import find_method
from lorakit.recipe.diagnostics import Fault
from lorakit.recipe.sections import AdapterSection, Recipe
from lorakit.recipe.yaml_source import KeyPath
from lorakit.sweeps.names import distinct, member_name, short_keys
from lorakit.sweeps.sections import Settings, SweepSection

SEED, OUTPUT_DIR, METHOD = "train.seed", "train.output_dir", "adapter.method"
#: More members than any sweep trains, and few enough to check in seconds.
MAX_MEMBERS = 4096


@dataclass(frozen=True)
class Draft:
    """A member before its recipe is checked. ``set`` are its own settings, without those of all
    members, and ``paths`` tell where the sweep has them."""

    name: str
    set: Settings
    paths: Mapping[str, KeyPath]


@dataclass(frozen=True)
class Member:
    """``recipe`` trains the member alone with the same result."""

    name: str
    set: Settings
    recipe: Recipe

    @property
    def identity(self) -> str:
        """The same for members that differ in nothing but their output directory."""
        flat = self.recipe.flat()
        return as_text({key: value for key, value in flat.items() if key != OUTPUT_DIR})

    @property
    def group(self) -> str:
        """The same for members that differ in nothing but their seed."""
        flat = self.recipe.flat()
        return as_text({k: v for k, v in flat.items() if k not in (OUTPUT_DIR, SEED)})


def as_text(value: Any) -> str:
    """JSON, which tells apart 1, 1.0 and true."""
    return json.dumps(value, sort_keys=True)


def draft_members(section: SweepSection) -> Iterator[Draft]:
    """The members of the grid, the last key varying fastest, then the explicit ones."""
    keys = list(section.grid)
    cells = list(product(*(range(len(values)) for values in section.grid.values())))
    grid = [
        {key: section.grid[key][at] for key, at in zip(keys, cell, strict=True)} for cell in cells
    ]
    explicit = [entry.set for entry in section.members]
    short = _short_keys(section)
    given = [entry.name or member_name(entry.set, short) for entry in section.members]
    made = [] if not keys else [member_name(settings, short) for settings in grid]
    # Given names come first, so that they stay as they are.
    names = distinct([*given, *made])
    for settings, cell, name in zip(grid if keys else (), cells, names[len(given) :], strict=False):
        paths = {key: ("grid", key, at) for key, at in zip(keys, cell, strict=True)}
        yield Draft(name, settings, paths)
    for at, (settings, name) in enumerate(zip(explicit, names, strict=False)):
        yield Draft(name, dict(settings), {key: ("members", at, "set", key) for key in settings})


def _short_keys(section: SweepSection) -> dict[str, str]:
    keys = (key for entry in section.members for key in entry.set)
    return short_keys([*section.grid, *keys])


def count_members(section: SweepSection) -> int:
    cells = prod(map(len, section.grid.values())) if section.grid else 0
    return cells + len(section.members)


def keys_of_other_method(base: Mapping[str, Any], method: object) -> list[str]:
    """The keys of ``adapter`` in a recipe that only its own method has, not the ``method`` that a
    member has instead: ``adapter.r`` if a recipe of LoRA is to be trained with AdaLoRA."""
    adapter = base.get("adapter")
    if not isinstance(adapter, dict) or method is None:
        return []
    default = AdapterSection.model_fields["method"].default
    before, after = (_method_keys(name) for name in (adapter.get("method", default), method))
    if not (before and after):  # one of them is unknown, which is an error of its own
        return []
    return [f"adapter.{key}" for key in adapter if key in before and key not in after]


def _method_keys(name: object) -> Collection[str]:
    found, _ = find_method(name) if isinstance(name, str) else (None, [])
    return found.Config.model_fields if found else ()


def taken_names(section: SweepSection, drafts: Sequence[Draft]) -> Iterator[Fault]:
    """The faults of given names that members of the grid would have without them."""
    short = _short_keys(section)
    made = {
        member_name(draft.set, short).casefold()
        for draft in drafts
        if any(path[0] == "grid" for path in draft.paths.values())
    }
    for at, entry in enumerate(section.members):
        if entry.name is not None and entry.name.casefold() in made:
            message = "is the name of a member of the grid"
            yield Fault(("members", at, "name"), message, entry.name, True, "another name")


def equal_members(members: Sequence[Member], drafts: Sequence[Draft]) -> Iterator[Fault]:
    """The faults of members that would train the same as an earlier one."""
    first: dict[str, str] = {}
    for member, draft in zip(members, drafts, strict=True):
        other = first.setdefault(member.identity, member.name)
        if other != member.name:
            path = next(iter(draft.paths.values()))[:2]
            message = f"member {member.name} has the same recipe as member {other}"
            yield Fault(path, message, allowed="members that differ")
