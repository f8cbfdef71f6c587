"""The metric by which members are compared."""

from __future__ import annotations

from lorakit import registry
from lorakit.errors import UserError
from lorakit.recipe.sections import Recipe
from lorakit.sweeps.load import Sweep
from lorakit.tasks.base import GenerationSection, Task


def sweep_metric(sweep: Sweep) -> str:
    """The sweep's ``metric``, or else the main metric of the members' tasks.

    Raises UserError if the members have different ones, and DataError if the rows decide what the
    task is and cannot be read.
    """
    if sweep.section.metric is not None:
        return sweep.section.metric
    tasks: dict[str, Recipe] = {}
    for member in sweep.members:
        tasks.setdefault(member.recipe.task.model_dump_json(), member.recipe)
    names = sorted({_main_metric(recipe) for recipe in tasks.values()})
    if len(names) > 1:
        raise UserError(f"metric: the members' tasks have several; allowed: {', '.join(names)}")
    return names[0]


def _main_metric(recipe: Recipe) -> str:
    task: Task = registry.task(recipe.task.name)
    config = recipe.task
    if type(task).chosen is not Task.chosen:
        split = task.load(config, task.eval_split(config)) or task.load(config, "train")
        if split is not None:
            task, config = task.chosen(config, split)
    if isinstance(config, GenerationSection) and not task.generates(config):
        return "loss"
    return task.main_metric(config)
