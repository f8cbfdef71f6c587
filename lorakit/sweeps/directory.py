"""The output directory of a sweep: its lock, and whether it has the sweep that is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorakit.distributed.group import alone
from lorakit.errors import UserError, listed, shown
from lorakit.io.atomic import creation_problem, write_text, writing
from lorakit.notes import Say
from lorakit.recipe.export import write_recipe, yaml_text
from lorakit.recipe.load import expand_environment
from lorakit.recipe.yaml_source import read_yaml
from lorakit.sweeps.load import Sweep
from lorakit.sweeps.members import as_text, draft_members
from lorakit.sweeps.sections import SweepSection
from lorakit.training.earlier_run import is_run
from lorakit.training.output_dir import locked_directory, restore_earlier_run
from lorakit.training.same_run import CHANGEABLE, check_same_recipe

#: Keys that a resumed sweep may change: they do not affect the results.
_CHANGEABLE = {"output_dir", "joint", "max_joint", *(f"set.{key}" for key in CHANGEABLE)}


@contextmanager
def exclusive_sweep(sweep: Sweep, resume: bool, say: Say) -> Iterator[None]:
    """Lock the output directory during the block; before it, write ``sweep.yaml``, the sweep's keys
    with every default, and the recipe of each member, and put back members that a killed run with
    ``--overwrite`` was to replace (``say`` gets a line about each).

    Raises UserError if the directory has something else, a sweep that is not to be resumed, or is
    locked by another sweep. A directory that it has created for nothing is deleted.
    """
    folder = sweep.output_dir
    for member in sweep.members if resume else ():
        restore_earlier_run(Path(member.recipe.train.output_dir), say)
    check_directory(sweep, resume)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with locked_directory(folder, "output_dir", "sweep"):
            check_directory(sweep, resume)  # again, since another sweep may have written to it
            write_settings(sweep)
            _write_recipes(sweep)
            yield
    finally:
        for path in created:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def check_directory(sweep: Sweep, resume: bool) -> None:
    """Raise UserError if the sweep cannot start, or with ``resume`` continue, in its directory."""
    folder, file = sweep.output_dir, sweep.record
    key = f"output_dir = {shown(str(folder))}"
    try:
        is_there = folder.exists()
    except OSError as error:  # too long
        raise UserError(f"{key}: cannot be created: {error.strerror}") from None
    if is_there and not folder.is_dir():
        raise UserError(f"{key}: a file with that name exists")
    if problem := creation_problem(folder):
        raise UserError(f"{key}: {problem}")
    if not is_there or all(path.name.startswith(".") for path in folder.iterdir()):
        return
    if not file.is_file():
        raise UserError(f"{key}: is not empty, and has no sweep; allowed: a new directory")
    if not resume:
        raise UserError(
            f"{key}: contains a sweep; continue it with --resume, or choose another directory"
        )
    _check_same(sweep, file)


def _check_same(sweep: Sweep, file: Path) -> None:
    stored = read_yaml(file)
    expand_environment(stored)
    before, now = _flat(stored.data), _flat(sweep.section.model_dump(mode="json"))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    old, new = _settings(stored.data), _settings(sweep.section.model_dump(mode="json"))
    if old == new:  # in whatever order the sweep has them
        changed = [key for key in changed if key != "members" and not key.startswith("grid.")]
    differences = [
        f"{key}: was {before.get(key, 'not set')}, now {now.get(key, 'not set')}" for key in changed
    ]
    if old != new and not differences:  # the order of the keys is part of the names
        was, is_now = (listed(names, most=1) for names in (old or (), new or ()))
        differences = [f"names of members: was {was}, now {is_now}"]
    if differences:
        raise UserError(f"--resume: the sweep differs from {file}: {'; '.join(differences)}")
    with alone():  # as each member trains
        for member in sweep.members:
            check_same_recipe(member.recipe, Path(member.recipe.train.output_dir))


def _settings(section: Mapping[str, Any]) -> dict[str, str] | None:
    """The settings of each member by its name, as texts; None if the sweep cannot be read."""
    try:
        drafts = list(draft_members(SweepSection.model_validate(section)))
    except ValidationError:
        return None
    return {draft.name: as_text(draft.set) for draft in drafts}


def _flat(section: Mapping[str, Any]) -> dict[str, str]:
    """The keys that affect the results, those of ``set`` and ``grid`` one by one, as texts."""
    found: dict[str, str] = {}
    for key, value in section.items():
        if key in ("set", "grid") and isinstance(value, dict):
            found |= {f"{key}.{name}": shown(item) for name, item in value.items()}
        elif key not in _CHANGEABLE:
            found[key] = shown(value)
    return {key: value for key, value in found.items() if key not in _CHANGEABLE}


def write_settings(sweep: Sweep) -> None:
    """Write ``sweep.yaml``, if it is not there."""
    file = sweep.record
    with writing(file):
        if not file.is_file():
            write_text(file, yaml_text(sweep.section.model_dump(mode="json")))


def _write_recipes(sweep: Sweep) -> None:
    """Write the recipes of the members that have neither one nor a run, which knows more of it."""
    for member in sweep.members:
        folder = Path(member.recipe.train.output_dir)
        path = folder / "recipe.yaml"
        with writing(path):
            if not path.is_file() and not is_run(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_recipe(member.recipe, path)
