"""Load a sweep: check its keys, and the recipe of every member."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorakit.errors import Problem, RecipeError, UserError, at_line, did_you_mean
from lorakit.recipe.diagnostics import Fault, explain
from lorakit.recipe.load import load_recipe
from lorakit.recipe.yaml_source import KeyPath, read_yaml
from lorakit.sweeps.check import (
    halving_faults,
    metric_faults,
    name_faults,
    recipe_faults,
    repeated_values,
    setting_faults,
)
from lorakit.sweeps.members import (
    MAX_MEMBERS,
    METHOD,
    OUTPUT_DIR,
    Draft,
    Member,
    count_members,
    draft_members,
    equal_members,
    keys_of_other_method,
    taken_names,
)
from lorakit.sweeps.problems import MemberProblems
from lorakit.sweeps.sections import MemberSection, Settings, SweepSection
from lorakit.sweeps.source import GRID, Source, read_source
from lorakit.training.output_dir import SWEEP_YAML


@dataclass(frozen=True)
class Sweep:
    """A checked sweep. ``section`` has its keys, with defaults, which ``source`` locates."""

    section: SweepSection
    members: tuple[Member, ...]
    source: Source

    @property
    def output_dir(self) -> Path:
        return Path(self.section.output_dir)

    @property
    def record(self) -> Path:
        """The file with the keys of the sweep, which ``resume`` compares."""
        return self.output_dir / SWEEP_YAML


def load_sweep(
    sweep: str | Path | Mapping[str, Any],
    *,
    grid: Sequence[str] = (),
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Sweep:
    """Load and check a sweep; see ``read_source`` for the arguments.

    Raises RecipeError with all problems at once; those of a recipe name the member.
    """
    source = read_source(sweep, grid=grid, overrides=overrides, options=options)
    section, faults = _checked_section(source)
    problems = [*source.yaml.problems, *map(source.located, [*source.faults, *faults])]
    members: tuple[Member, ...] = ()
    if section is not None:
        members, found = _checked_members(section, source)
        problems += found
    if problems or section is None:
        raise RecipeError(sorted(problems, key=lambda p: (p.line is None, p.line or 0)))
    return Sweep(section, members, source)


@contextmanager
def located(sweep: Sweep) -> Iterator[None]:
    """Let a UserError in the block that starts with a key of the sweep start with the file and
    line, or the option, that set the key."""
    try:
        yield
    except UserError as error:
        key = re.match(r"\w*", str(error))
        if key is not None and key[0] in SweepSection.model_fields:
            error.args = (f"{at_line(*sweep.source.place((key[0],)))}: {error}",)
        raise


def _checked_section(source: Source) -> tuple[SweepSection | None, list[Fault]]:
    """The section without what has a fault, to check its members; None if that is not possible."""
    known = tuple(SweepSection.model_fields)
    faults = [
        Fault((key,), did_you_mean("unknown key", key, known), value, True, ", ".join(known))
        for key, value in source.data.items()
        if key not in known
    ]
    unread = [fault for fault in source.faults if fault.file is None]
    if any(fault.path[0] not in ("set", "grid") for fault in unread):
        return None, faults
    given = {key: value for key, value in source.data.items() if key in known}
    given = _without(given, unread)
    try:
        section = SweepSection.model_validate(given)
    except ValidationError as error:
        found = [_explained(fault) for fault in explain(SweepSection, given, error)]
        faults += found
        if any(fault.path == ("recipe",) for fault in found):
            return None, faults
        section = SweepSection.model_validate({"output_dir": "."} | _without(given, found))
    wrong = [*setting_faults(section), *repeated_values(section)]
    faults += [*wrong, *name_faults(section.members), *recipe_faults(section)]
    unread_grid = any(fault.file == GRID for fault in source.faults)
    if not (source.data.get("grid") or source.data.get("members") or unread_grid):
        faults.append(Fault((), "has no members", allowed="grid, members, or both"))
    if (count := count_members(section)) > MAX_MEMBERS:
        option = GRID if GRID in source.options.values() else None
        path, message = () if option else ("grid",), f"makes {count:,} members"
        faults.append(Fault(path, message, allowed=f"at most {MAX_MEMBERS:,}", file=option))
        return None, faults
    section = SweepSection.model_validate(_without(section.model_dump(), wrong))
    return section if Path(section.recipe).is_file() else None, faults


def _without(given: Mapping[str, Any], faults: Sequence[Fault]) -> dict[str, Any]:
    """The keys without those that have a fault; of ``set`` and ``grid`` each key on its own."""
    rest = dict(given)
    for fault in faults:
        name = str(fault.path[0])
        if name in ("set", "grid") and len(fault.path) > 1 and name in rest:
            rest[name] = {k: v for k, v in rest[name].items() if k != fault.path[1]}
        else:
            rest.pop(name, None)
    return rest


def _explained(fault: Fault) -> Fault:
    """Add the known keys to an unknown key of a member."""
    if fault.message != "unknown key":
        return fault
    known = tuple(MemberSection.model_fields)
    message = did_you_mean(fault.message, fault.path[-1], known)
    return replace(fault, message=message, allowed=", ".join(known))


def _checked_members(
    section: SweepSection, source: Source
) -> tuple[tuple[Member, ...], list[Problem]]:
    try:
        base = read_yaml(Path(section.recipe)).data
    except RecipeError as error:  # the same for every member
        return (), list(error.problems)
    drafts = list(draft_members(section)) or [Draft("", {}, {})]
    members, problems = [], MemberProblems(source, len(drafts))
    for draft in drafts:
        try:
            members.append(make_member(section, base, draft.name, draft.set))
        except RecipeError as error:
            common: dict[str, KeyPath] = {key: ("set", key) for key in section.set}
            problems.add(draft.name, {**common, **draft.paths}, error.problems)
    faults = [*metric_faults(section.metric, members), *halving_faults(section, members)]
    faults += taken_names(section, drafts)
    if len(members) == len(drafts):
        faults += equal_members(members, drafts)
    return tuple(members), [*problems.listed(), *map(source.located, faults)]


def make_member(
    section: SweepSection, base: Mapping[str, Any], name: str, settings: Settings
) -> Member:
    """Load the recipe of the member; ``base`` is the data of the sweep's recipe."""
    folder = str(Path(section.output_dir, "members", name))
    changes = {**section.set, **settings, OUTPUT_DIR: folder}
    without = keys_of_other_method(base, changes.get(METHOD))
    return Member(name, settings, load_recipe(section.recipe, changes, without=without))
