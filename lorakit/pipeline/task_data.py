"""Load a recipe's rows, and resolve the task's configuration from them.

No tensor library is imported, since ``lorakit eval --predictions`` does not need one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit import registry
from lorakit.data.examples import Example, Problem
from lorakit.data.file_names import split_names
from lorakit.data.paths import no_split
from lorakit.data.sources import Split
from lorakit.data.stream import Stream, open_stream
from lorakit.errors import DataError, UserError, counted
from lorakit.notes import Say
from lorakit.pipeline.validation_share import check_no_validation, divide, first_rows
from lorakit.recipe.sections import ModelSection, Recipe
from lorakit.tasks.base import Task
from lorakit.tasks.checks import column_notes
from lorakit.tasks.labelling import label_order

#: Returns the class names of the base's classification head, in the head's order, given labels of
#: the data; None if the head lacks one of them.
HeadNames = Callable[[Sequence[str]], "list[str] | None"]


@dataclass(frozen=True)
class TaskData:
    """A task and the rows it reads, before they are tokenized.

    ``config`` is the recipe's ``task`` section, completed from the rows: class names, and the task
    that ``auto`` chose. ``split`` is the split to train or evaluate on; of a ``stream`` it is only
    the first rows. ``labels`` are the class names by index, None for regression and causal tasks.
    ``skip_bad_rows`` tells whether bad rows of ``split`` are skipped rather than an error.
    """

    task: Task
    config: Any
    split: Split
    labels: list[str] | None
    skip_bad_rows: bool = False
    validation: Split | None = None
    stream: Stream | None = None

    @property
    def problem(self) -> Problem | None:
        """What the labels of an encoder's rows are; None for causal tasks."""
        return self.task.problem(self.config)

    def example(self, row: Mapping[str, Any]) -> Example:
        """Return the task's example of one row."""
        return self.task.example(row, self.config)


def load_task_data(
    recipe: Recipe,
    split: str | None = None,
    *,
    limit: int | None = None,
    trained_labels: Sequence[str] | None = None,
    skip_bad_rows: bool = False,
    say: Say,
) -> TaskData:
    """Load one split, by default the one that the task evaluates on.

    ``limit`` (the first N rows) overrides the recipe's limits. Unless the recipe lists class names,
    they are ``trained_labels``, with which an adapter was trained, or else found in the data.
    ``skip_bad_rows`` applies ``task.on_bad_row`` as training does; without it a bad row is an
    error, since a score covers every row. Notes go to ``say``.

    Raises DataError if the source has no such split or a row cannot be read.
    """
    task: Task = registry.task(recipe.task.name)
    config = recipe.task
    if config.validation_share is not None:
        wanted = split or task.eval_split(config)
        if wanted in ("train", *split_names(task.eval_split(config))):
            return _load_part(recipe, wanted, limit, trained_labels, skip_bad_rows, say)
    changes: dict[str, Any] = {}
    if limit is not None:
        changes = {"limit_train": limit, "limit_eval": limit}
    if not skip_bad_rows:
        changes["on_bad_row"] = "error"
    found = _load_split(task, config.model_copy(update=changes), split or task.eval_split(config))
    task, config = settle(task, config, found, say)
    head_names = _head_names_of(recipe.model)
    config = _with_labels(task, config, trained_labels, found, head_names, say)
    return TaskData(
        task=task,
        config=config,
        split=found,
        labels=task.labels(config, None),
        skip_bad_rows=skip_bad_rows and _skips(found, config),
    )


def _load_part(
    recipe: Recipe,
    name: str,
    limit: int | None,
    trained_labels: Sequence[str] | None,
    skip_bad_rows: bool,
    say: Say,
) -> TaskData:
    """``load_task_data`` for a split that ``task.validation_share`` makes."""
    task: Task = registry.task(recipe.task.name)
    check_no_validation(task, recipe.task)
    whole = _load_split(task, recipe.task, "train")
    task, config = settle(task, recipe.task, whole, say)
    if trained_labels and not _has_labels(config):
        config = config.model_copy(update={"labels": list(trained_labels)})
    elif not _has_labels(config):
        config = resolve_labels(task, config, whole, [whole], _head_names_of(recipe.model), say)
    train, validation = divide(task, config, whole)
    is_train = name == "train"
    if limit is None and not is_train:
        limit = config.limit_eval
    return TaskData(
        task=task,
        config=config,
        split=first_rows(train if is_train else validation, limit),
        labels=task.labels(config, None),
        skip_bad_rows=skip_bad_rows and _skips(train, config) and is_train,
    )


def load_training_data(recipe: Recipe, say: Say) -> TaskData:
    """Load the training split, or open it as a stream, and the validation split if there is one.

    Raises DataError for data that cannot be read or does not fit the task.
    """
    task: Task = registry.task(recipe.task.name)
    config = recipe.task
    task.check_requirements(config)
    stream = _open_stream(task, config) if config.streaming else None
    train = stream.head if stream else _load_split(task, config, "train")
    task, config = settle(task, config, train, say)
    if stream:
        task.check_columns(train, config)
    validation = None
    if config.validation_share is not None:
        check_no_validation(task, config)
    elif (validation := task.load(config, task.eval_split(config))) is not None:
        settle(task, config, validation, say)
    splits = [split for split in (train, validation) if split is not None]
    labeled = None if stream else train
    head_names = _head_names_of(recipe.model)
    config = resolve_labels(task, config, labeled, splits, head_names, say)
    if config.validation_share is not None:
        train, validation = divide(task, config, train)
        every = counted(len(train) + len(validation), "row")
        say(f"{len(validation):,} of {every} held out for validation (task.validation_share)")
        validation = first_rows(validation, config.limit_eval)
    return TaskData(
        task=task,
        config=config,
        split=train,
        labels=task.labels(config, labeled),
        skip_bad_rows=_skips(train, config),
        validation=validation,
        stream=stream,
    )


def settle(task: Task, config: Any, split: Split, say: Say) -> tuple[Task, Any]:
    """Return the task that reads ``split`` and its configuration.

    Reports to ``say`` which files and columns were chosen, which format was recognized, and which
    columns and keys are not used.
    """
    chosen, chosen_config = task.chosen(config, split)
    for note in split.notes:
        say(note)
    for note in chosen.notes(chosen_config, split):
        say(note if chosen is task else f"{note}: task {chosen_config.name}")
    for note in column_notes(chosen, chosen_config, split):
        say(note)
    return chosen, chosen_config


def resolve_labels(
    task: Task,
    config: Any,
    train: Split | None,
    splits: Sequence[Split],
    head_names: HeadNames,
    say: Say,
) -> Any:
    """Return ``config`` with the class names resolved.

    They come from ``train`` through ``task.resolve``. If they do not cover every label of
    ``splits``, but the names of the base's classification head do, those are used instead. Raises
    DataError if ``train`` does not determine the names and the head's cannot be used.
    """
    if _has_labels(config):
        return task.resolve(config, train)
    resolved, problem = None, None
    try:
        resolved = task.resolve(config, train)
        if all(task.accepts_labels(resolved, split) for split in splits):
            return resolved
    except DataError as error:
        problem = error
    found = task.labels_of_rows(config, splits)
    names = head_names(found) if found else None
    if found and names:
        if set(found) <= set(names):  # names, not indices: sort them as the training split's are
            names.sort(key=label_order)
        say(f"task.labels: taken from the base's classification head: {', '.join(names)}")
        return config.model_copy(update={"labels": names})
    if problem is not None:
        raise problem
    return resolved


def _with_labels(
    task: Task,
    config: Any,
    trained: Sequence[str] | None,
    split: Split,
    head_names: HeadNames,
    say: Say,
) -> Any:
    """Return ``config`` with the class names that it leaves to the data."""
    if _has_labels(config):
        return config
    if trained:
        return config.model_copy(update={"labels": list(trained)})
    train = task.load(config, "train")
    other = task.load(config, task.eval_split(config)) if split.name == "train" else train
    splits = [found for found in (split, other) if found is not None]
    return resolve_labels(task, config, train, splits, head_names, say)


def _has_labels(config: Any) -> bool:
    """Whether the class names do not depend on the data."""
    return getattr(config, "labels", ()) is not None or getattr(config, "regression", False)


def _head_names_of(section: ModelSection) -> HeadNames:
    def head_names(labels: Sequence[str]) -> list[str] | None:
        from lorakit.models.heads import names_of_head  # loads transformers

        return names_of_head(section, labels)

    return head_names


def _skips(split: Split, config: Any) -> bool:
    return split.name == "train" and config.on_bad_row == "skip"


def _load_split(task: Task, config: Any, name: str) -> Split:
    found = task.load(config, name)
    if found is None:
        raise _no_split(task, config, name)
    return found


def _open_stream(task: Task, config: Any) -> Stream:
    if type(task).read_file is not Task.read_file:
        raise UserError(
            f"task.streaming = true: {config.name} uses a file format that cannot be streamed; "
            "allowed: false"
        )
    skip_bad = config.on_bad_row == "skip"
    stream = open_stream(
        config.path, "train", task.hub_source(config), config.limit_train, skip_bad
    )
    if stream is None:
        raise _no_split(task, config, "train")
    return stream


def _no_split(task: Task, config: Any, name: str) -> DataError:
    if config.path is not None:
        return no_split(config.path, name)
    source = "/".join(part for part in task.hub_source(config) or () if part)
    return DataError(f"{source}: no split {name!r}")
