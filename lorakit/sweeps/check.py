"""What a sweep's keys may be, beyond their types, and whether its members can read their data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit import registry
from lorakit.errors import UserError, did_you_mean
from lorakit.notes import Say, silent
from lorakit.pipeline.task_data import load_training_data
from lorakit.recipe.check import METRIC_NAMES
from lorakit.recipe.diagnostics import Fault
from lorakit.recipe.sections import Recipe
from lorakit.recipe.yaml_source import KeyPath
from lorakit.sweeps.members import OUTPUT_DIR, Member, as_text
from lorakit.sweeps.names import MAX_NAME, NAME
from lorakit.sweeps.sections import MemberSection, SweepSection, halving_points, step_of

#: The keys that ``trainable_parameters`` sets.
RANKS = ("adapter.r", "adapter.target_r", "adapter.init_r")


def setting_faults(section: SweepSection) -> Iterator[Fault]:
    """Faults of the keys of ``set``, ``grid`` and ``members``; their values are the recipe's."""
    places: list[tuple[KeyPath, Mapping[str, Any]]] = [
        (("set",), section.set), (("grid",), section.grid)
    ]  # fmt: skip
    places += [(("members", at, "set"), m.set) for at, m in enumerate(section.members)]
    for path, settings in places:
        for key, value in settings.items():
            yield from _key_faults((*path, key), key, value)
            if section.trainable_parameters and key in RANKS:
                message = "trainable_parameters chooses the rank"
                yield Fault((*path, key), message, value, True, "one of the two")
            if path == ("grid",) and key in section.set:
                yield Fault((*path, key), "is in set, too", value, True, "one of the two")


def halving_faults(section: SweepSection, members: Sequence[Member]) -> Iterator[Fault]:
    """Halving compares evaluations before the end of a run, at or after its first point."""
    for member in members if section.halving else ():
        train = member.recipe.train
        if not train.eval_every_steps and not train.max_steps and (train.epochs or 1) <= 1:
            message = f"member {member.name} is only evaluated at its end"
            yield Fault(("halving",), message, section.halving, True, "with train.eval_every_steps")
            return
        last_point = halving_points(section)[-1]
        if train.max_steps and last_point >= train.max_steps:
            message = f"member {member.name} ends at step {train.max_steps}, before the last point"
            yield Fault(("halving",), message, section.halving, True, "points before its end")
            return
        if train.eval_every_steps and train.max_steps:
            every, last = train.eval_every_steps, train.max_steps - 1
            first = min(step_of(point, train.max_steps) for point in halving_points(section))
            if last // every * every < first:
                message = (
                    f"member {member.name} is not evaluated between step {first}, the first point, "
                    f"and its end at step {train.max_steps}, so halving would never act"
                )
                below = min(every, train.max_steps)
                allowed = f"with train.eval_every_steps below {below}, or an earlier point"
                yield Fault(("halving",), message, section.halving, True, allowed)
                return


def halving_note(section: SweepSection, members: Sequence[Member]) -> str | None:
    """A note if halving has nothing to compare: the runs of one setting are not ranked."""
    if section.halving and len({member.group for member in members}) < 2:
        return "halving: the members differ only in their seeds, so none would be stopped"
    return None


def _key_faults(path: KeyPath, key: str, value: Any) -> Iterator[Fault]:
    name, dot, rest = key.partition(".")
    sections = tuple(Recipe.model_fields)
    if name not in sections:
        message = did_you_mean("unknown section", name, sections)
        if not dot and (owner := _owner(key)):
            message = f"unknown section (did you mean {f'{owner}.{key}'!r}?)"
        yield Fault(path, message, value, True, f"SECTION.KEY; sections: {', '.join(sections)}")
    elif not all(rest.split(".")):
        yield Fault(path, "names no key", value, True, "SECTION.KEY, such as train.epochs")
    elif key == OUTPUT_DIR:
        yield Fault(path, "each member has its own", value, True, "output_dir of the sweep")


def _owner(key: str) -> str | None:
    """The section that has ``key``, of any method or task."""
    classes: list[tuple[str, Any]] = [
        (name, field.annotation) for name, field in Recipe.model_fields.items()
    ]
    classes += [("adapter", method.Config) for method in registry.methods().values()]
    classes += [("task", task.Config) for task in registry.tasks().values()]
    return next((n for n, c in classes if key in getattr(c, "model_fields", ())), None)


def repeated_values(section: SweepSection) -> Iterator[Fault]:
    """The faults of values that the grid has twice."""
    for key, values in section.grid.items():
        texts = [as_text(value) for value in values]
        for at, text in enumerate(texts):
            if text in texts[:at]:
                path = ("grid", key, at)
                yield Fault(path, "duplicate", values[at], True, "each value once")


def name_faults(members: Sequence[MemberSection]) -> Iterator[Fault]:
    taken: set[str] = set()
    for at, member in enumerate(members):
        name, path = member.name, ("members", at, "name")
        if name is None:
            continue
        if not NAME.fullmatch(name) or len(name) > MAX_NAME:
            allowed = f"1 to {MAX_NAME} letters, digits and any of ._+=,@- after the first"
            yield Fault(path, "is the name of a directory", name, True, allowed)
        if name.casefold() in taken:
            yield Fault(path, "duplicate", name, True, "each name once")
        taken.add(name.casefold())


def recipe_faults(section: SweepSection) -> Iterator[Fault]:
    if not Path(section.recipe).is_file():
        yield Fault(("recipe",), "no such file", section.recipe, True, "a recipe file")


def check_data(members: Sequence[Member], say: Say) -> None:
    """Raise the UserError of the first member if none of them can read its data: they would all
    fail after the sweep has started. One that can is enough, since a failed member ends no other;
    say if it has no rows to be compared by.
    """
    errors: dict[str, UserError] = {}
    for member in members:
        recipe = member.recipe
        key = f"{recipe.model.model_dump_json()} {recipe.task.model_dump_json()}"
        if key in errors:
            continue
        try:
            data = load_training_data(recipe, silent)
        except UserError as error:
            errors[key] = error
        except Exception:  # of a user's task: the run describes it
            return
        else:
            if data.validation is None:
                say(
                    "no validation split: members will not be compared; hint: set "
                    "task.validation_share or task.path.validation"
                )
            return
    if errors:
        raise next(iter(errors.values()))


def metric_faults(metric: str | None, members: Sequence[Member]) -> Iterator[Fault]:
    """A user's task has metrics of its own."""
    own = any(registry.is_user_task(member.recipe.task.name) for member in members)
    if metric is not None and metric not in METRIC_NAMES and not own:
        message = did_you_mean("unknown metric", metric, METRIC_NAMES)
        yield Fault(("metric",), message, metric, True, f"null, {', '.join(METRIC_NAMES)}")
