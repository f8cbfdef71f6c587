"""The weights of a classifier's classes in the loss."""

from __future__ import annotations

from collections.abc import Mapping

from lorakit.data.encode import EncodedSplit
from lorakit.errors import DataError
from lorakit.pipeline.task_data import TaskData
from lorakit.tasks.checks import label_counts
from lorakit.tasks.labelling import named_weights


def class_weights(data: TaskData, train: EncodedSplit) -> tuple[float, ...] | None:
    """Return the weight of each class, in the task's order; None if ``task.class_weights`` is null.

    ``balanced`` is, for one label per row (or word), rows / (classes * rows of the class), as in
    scikit-learn; for several labels per row, rows without the class / rows with it. Raises
    DataError for a name that is not a class, and if a balanced weight is 0 or infinite.
    """
    given, labels = getattr(data.config, "class_weights", None), data.labels
    if given is None or labels is None:
        return None
    if given == "balanced":
        several = data.problem == "multi_label_classification"
        counts = label_counts(labels, train.class_ids())
        return _balanced(counts, len(train) if several else None, data.split.name)
    try:
        return named_weights(given, labels)
    except ValueError as error:
        raise DataError(f"task.class_weights: {error}") from error


def _balanced(counts: Mapping[str, int], rows: int | None, split: str) -> tuple[float, ...]:
    """``rows`` is the number of rows, each with several labels; None if each has one."""
    for label, count in counts.items():
        if count in (0, rows):
            which = "every row" if count else "no row"
            raise DataError(
                f'task.class_weights = "balanced": {which} of {split} has the label {label}; '
                "allowed: weights by name, or a list of weights"
            )
    if rows is not None:
        return tuple((rows - count) / count for count in counts.values())
    total = sum(counts.values())
    return tuple(total / (len(counts) * count) for count in counts.values())
