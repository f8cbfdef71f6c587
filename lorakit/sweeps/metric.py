"""The metric by which members are compared."""

from __future__ import annotations

from typing import Any

from lorakit import registry
from lorakit.errors import LorakitError, UserError, shown
from lorakit.recipe.sections import Recipe
from lorakit.sweeps.load import Sweep
from lorakit.tasks.base import Task
from lorakit.tasks.token_classification import TokenClassification


def sweep_metric(sweep: Sweep) -> str:
    """The sweep's ``metric``, or else the main metric of the members' tasks.

    Raises UserError if a task does not measure the former, as far as that is known in advance, or
    if the tasks have different ones of the latter, and DataError if the rows decide what the task
    is and cannot be read.
    """
    tasks: dict[str, Recipe] = {}
    for member in sweep.members:
        tasks.setdefault(member.recipe.task.model_dump_json(), member.recipe)
    if (metric := sweep.section.metric) is not None:
        for recipe in tasks.values():
            _check_measures(metric, recipe)
        return metric
    names = sorted({_main_metric(recipe) for recipe in tasks.values()})
    if len(names) > 1:
        raise UserError(f"metric: the members' tasks have several; allowed: {', '.join(names)}")
    return names[0]


def _check_measures(metric: str, recipe: Recipe) -> None:
    try:
        known = _measured_metrics(recipe)
    except LorakitError:  # which the member's run will raise, too
        return
    if known is not None and metric not in known:
        raise UserError(
            f"metric = {shown(metric)}: the task {recipe.task.name} does not measure it; "
            f"allowed: null, {', '.join(sorted(known))}"
        )


def _measured_metrics(recipe: Recipe) -> set[str] | None:
    """What the final evaluation measures; None if that is not known in advance."""
    if registry.is_user_task(recipe.task.name):
        return None
    task, config = _chosen(recipe)
    if names := task.metric_names(config):
        return {"loss", *names}
    if not task.generates(config):
        return {"loss", "perplexity"}
    split = task.load(config, task.eval_split(config))
    if split is None:
        return None
    return {"loss", "perplexity", *task.metrics([""] * len(split), split, config)}


def _chosen(recipe: Recipe) -> tuple[Task, Any]:
    """The task and its keys, which rows may decide."""
    task: Task = registry.task(recipe.task.name)
    config = recipe.task
    if type(task).chosen is not Task.chosen:
        split = task.load(config, task.eval_split(config)) or task.load(config, "train")
        if split is not None:
            return task.chosen(config, split)
    if isinstance(task, TokenClassification):  # its tags decide which metrics it has
        return task, task.resolve(config, task.load(config, "train"))
    return task, config


def _main_metric(recipe: Recipe) -> str:
    task, config = _chosen(recipe)
    return task.best_metric(config, final=True)
