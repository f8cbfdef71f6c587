"""``task.validation_share``: hold out a part of the training rows for validation."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any

from lorakit.data.rows import Row, UnreadRow
from lorakit.data.selection import held_out, select
from lorakit.data.sources import Split, limits
from lorakit.errors import DataError, counted
from lorakit.tasks.base import Task

#: The same rows are held out whatever ``train.seed`` is, so that runs can be compared.
_SEED = 0


def divide(task: Task, config: Any, train: Split) -> tuple[Split, Split]:
    """Return the rows to train on, and those to validate on: ``config.validation_share`` of the
    rows of each class and of each source of a mixture.

    With ``on_bad_row: skip``, rows that cannot be read or that the task rejects do not count, and
    remain among those to train on, where they are skipped. Raises DataError if a part would be
    empty.
    """
    share, skip = config.validation_share, config.on_bad_row == "skip"
    keys = dict(enumerate(_keys(task, config, train)))
    if skip:
        good = (index for index, row in enumerate(train.rows) if _is_good(task, config, row))
        keys = {index: keys[index] for index in good}
    chosen = held_out(share, keys, _SEED)
    if not chosen:
        rows = f"{counted(len(keys), 'row')}{' that are not bad' if skip else ''}"
        raise DataError(
            f"task.validation_share = {share:g}: too small to hold out any of {rows}; "
            "allowed: null, or a larger share"
        )
    kept = set(chosen)
    rest = [index for index in range(len(train)) if index not in kept]
    validation = select(replace(train, sources=()), chosen, task.eval_split(config))
    return select(train, rest, "train"), validation


def first_rows(split: Split, limit: int | None) -> Split:
    """The first ``limit`` rows; of a mixture, those of each source in proportion to its weight."""
    if limit is None or limit >= len(split):
        return split
    indices: list[int] = []
    start = 0
    for source, count in zip(split.sources, limits(split.sources, limit), strict=True):
        indices += range(start, start + min(count or 0, source.rows))
        start += source.rows
    return select(split, indices or range(limit), split.name)


def check_no_validation(task: Task, config: Any) -> None:
    """Raise DataError if there is validation data besides the share."""
    name = task.eval_split(config)
    given = task.load(config.model_copy(update={"limit_eval": 1}), name)
    if given is not None:
        raise DataError(
            f"task.validation_share = {config.validation_share:g}: there is a {name} split already "
            f"({given.source}); allowed: null, or training data alone, as in "
            "task.path: {train: FILES}"
        )


def _is_good(task: Task, config: Any, row: Row | UnreadRow) -> bool:
    if isinstance(row, UnreadRow):
        return False
    try:
        task.example(row, config)
    except DataError:
        return False
    return True


def _keys(task: Task, config: Any, train: Split) -> Iterator[tuple[Hashable, ...]]:
    classes = task.strata(config, train) or [None] * len(train)
    sources = [n for n, source in enumerate(train.sources) for _ in range(source.rows)]
    return zip(sources or [0] * len(train), classes, strict=True)
