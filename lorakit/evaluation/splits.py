"""Which rows an evaluation is about. No tensor library is loaded here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lorakit.data.sources import Split
from lorakit.errors import DataError
from lorakit.tasks.base import Task


def load_eval_split(task: Task, config: Any, name: str | None, limit: int | None) -> Split:
    """The split ``name`` (None: the task's own choice), or its first ``limit`` rows; ``limit``
    goes before the recipe's. Raises DataError if the source has no such split."""
    name = name or task.eval_split(config)
    if limit is not None:
        config = config.model_copy(update={"limit_train": limit, "limit_eval": limit})
    found = task.load(config, name)
    if found is None:
        source = config.path or "/".join(part for part in task.hub_source(config) or () if part)
        raise DataError(f"{source}: no split {name!r} to evaluate on")
    return found


def with_labels(task: Task, config: Any, trained: Sequence[str] | None) -> Any:
    """``config`` with the class names that it leaves to the data: those that the adapter was
    ``trained`` with, else those of the train split."""
    if getattr(config, "labels", ()) is not None or getattr(config, "regression", False):
        return config
    if trained:
        return config.model_copy(update={"labels": list(trained)})
    return task.resolve(config, task.load(config, "train"))


def settle(task: Task, config: Any, split: Split, say: Callable[[str], None]) -> tuple[Task, Any]:
    """The task that reads ``split``, and its config; says what was chosen and recognised."""
    chosen, own = task.chosen(config, split)
    for note in chosen.notes(own, split):
        say(note if chosen is task else f"{note}: task {own.name}")
    return chosen, own
