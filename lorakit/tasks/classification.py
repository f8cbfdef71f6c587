"""``classification``: predict a class or a number from a text or a pair of texts, in any columns.

``LabelledTask`` is the base class that it shares with ``glue``.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from lorakit.data.examples import ClassificationExample
from lorakit.data.sources import Split
from lorakit.errors import DataError, shown
from lorakit.metrics.labels import label_score, require_metrics
from lorakit.recipe.sections import TaskSection, Text
from lorakit.tasks.base import (
    Prediction,
    Row,
    Task,
    check_count,
    exclusive,
    map_rows,
    required_text,
)
from lorakit.tasks.checks import folded_label

#: Stands for a predicted class that only the base's head has, given as {"error": ...}.
NO_CLASS = -1
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_HIDDEN = "the labels are hidden, as in a benchmark's test split"


@dataclass(frozen=True)
class Labelling:
    """The columns of a row's texts and label. ``labels`` are the class names by index, None for
    regression; ``minimum`` and ``maximum`` bound the target of a regression. The first of
    ``metrics`` is the main one."""

    text: str
    pair: str | None
    label: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    minimum: float = -math.inf
    maximum: float = math.inf


class LabelledTask(Task):
    """A task for an encoder: predict a class or a number from one text or a pair of texts."""

    kind = "encoder"

    @abstractmethod
    def labelling(self, config: Any) -> Labelling:
        """The columns, labels and metrics of ``config``."""

    def columns(self, config: Any) -> tuple[str, ...]:
        found = self.labelling(config)
        return tuple(name for name in (found.text, found.pair, found.label) if name is not None)

    def text_columns(self, config: Any) -> tuple[str, ...]:
        found = self.labelling(config)
        return (found.text,) if found.pair is None else (found.text, found.pair)

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        return self.columns(config)

    def labels(self, config: Any, train: Split | None) -> list[str] | None:
        found = self.labelling(config).labels
        return None if found is None else list(found)

    def example(self, row: Row, config: Any) -> ClassificationExample:
        where = self.labelling(config)
        return ClassificationExample(
            text=required_text(row, where.text),
            text_pair=None if where.pair is None else required_text(row, where.pair),
            label=read_label(row[where.label], where),
        )

    def main_metric(self, config: Any) -> str:
        return self.labelling(config).metrics[0]

    def check_requirements(self, config: Any) -> None:
        require_metrics(self.labelling(config).metrics)

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """The metrics of ``labelling``. With two classes, F1 is that of class 1; with more, the
        unweighted mean over the classes (macro).

        A prediction ``{"error": ...}`` is always wrong. A score that is undefined because all
        predictions or labels are equal (a correlation's 0 / 0) is 0. Raises DataError for a
        prediction that is not a label id, or for a regression not a finite number.
        """
        where = self.labelling(config)
        check_count(predictions, split)
        gold = map_rows(split, split.column(where.label), lambda value: read_label(value, where))
        read = [_prediction(value, where, number) for number, value in enumerate(predictions, 1)]
        classes = len(where.labels or ())
        return {name: label_score(name, gold, read, classes) for name in where.metrics}


class ClassificationConfig(TaskSection):
    """``text_column``, ``text_pair_column`` (null: one text) and ``label_column`` name the columns.

    ``labels`` are the class names by id; a row's label is a name or an id. If ``labels`` is null,
    the names are taken from the train split and sorted; integers, as numbers or text, are names
    there too (1 and 2 are the classes ``1`` and ``2``). If any name is an integer, labels are
    always names, never ids. With ``regression: true`` the label is a number. ``dataset_name`` and
    ``dataset_config_name`` are a Hub data set, read when ``path`` is null.
    """

    name: Text = "classification"
    text_column: Text = "text"
    text_pair_column: Text | None = None
    label_column: Text = "label"
    labels: Annotated[list[Text], Field(min_length=2)] | None = None
    regression: bool = False
    dataset_name: Text | None = None
    dataset_config_name: Text | None = None

    @model_validator(mode="after")
    def _labels_fit(self) -> ClassificationConfig:
        if self.labels is not None and self.regression:
            raise exclusive("labels", "regression: true")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            duplicate = next(name for name in self.labels if self.labels.count(name) > 1)
            raise ValueError(f"labels: duplicate name {duplicate!r}")
        return self


class Classification(LabelledTask):
    names = ("classification",)
    summary = "classification or regression of texts or pairs of texts, in your own columns"
    Config = ClassificationConfig

    def hub_source(self, config: Any) -> tuple[str, str | None] | None:
        return (config.dataset_name, config.dataset_config_name) if config.dataset_name else None

    def labelling(self, config: Any) -> Labelling:
        columns = (config.text_column, config.text_pair_column, config.label_column)
        if config.regression:
            return Labelling(*columns, None, ("pearson", "spearmanr"))
        return Labelling(*columns, tuple(config.labels or ()), ("accuracy", "f1"))

    def labels(self, config: Any, train: Split | None) -> list[str] | None:
        if config.regression:
            return None
        if config.labels is not None:
            return list(config.labels)
        if train is None:
            raise DataError(
                "task.labels = null: there is no train split to take the names from; "
                "allowed: a list of names"
            )
        return _declared_labels(train, config.label_column) or _found_labels(
            train, config.label_column, config.on_bad_row == "skip"
        )

    def accepts_labels(self, config: Any, split: Split) -> bool:
        where = self.labelling(config)
        try:
            for value in split.column(where.label):
                read_label(value, where)
        except DataError:
            return False
        return True

    def labels_of_rows(self, config: Any, splits: Sequence[Split]) -> list[str] | None:
        values = (value for split in splits for value in split.column(config.label_column))
        found: dict[str, None] = {}
        for value in values:
            name = label_name(value)
            if not name:
                return None
            found[name] = None
        return list(found)

    def resolve(self, config: Any, train: Split | None) -> Any:
        return config.model_copy(update={"labels": self.labels(config, train)})


def _declared_labels(train: Split, column: str) -> list[str] | None:
    """The names that a Hub data set declares for its ids."""
    feature = (getattr(train.rows, "features", None) or {}).get(column)
    names = getattr(feature, "names", None)
    return list(names) if names else None


def _found_labels(train: Split, column: str, skip_bad: bool) -> list[str]:
    names = set()
    numbers = False
    for index, value in enumerate(train.column(column)):
        name = label_name(value)
        if not name and skip_bad:
            continue
        if not name:
            raise DataError(
                f"{train.locate(index)}: {column} = {shown(value)}; allowed: a name or a whole "
                "number; for other numbers, set task.regression: true, or list them as names in "
                "task.labels"
            )
        names.add(name)
        numbers = numbers or not isinstance(value, str)
    if len(names) < 2:
        found = f"only one label, {min(names)}" if names else "no labels"
        raise DataError(f"{train.source}: column {column!r} has {found}")
    if numbers and any(as_integer(name) is None for name in names):
        raise DataError(f"{train.source}: column {column!r} mixes names and numbers")
    return sorted(names, key=label_order)


def label_order(name: str) -> tuple[bool, int, str]:
    """Sort key for class names: integers by value, then the others alphabetically."""
    number = as_integer(name)
    return (number is None, number or 0, name)


def read_label(value: Any, where: Labelling) -> int | float:
    """The class index, or the target of a regression. A class is given by its name or its id (a
    number or its text); only by its name if any name is an integer.

    Raises DataError if the value is missing, hidden (-1), unknown, out of range or not finite.
    """
    shown_label = f"{where.label} = {shown(value)}"
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{shown_label}: the label is missing")
    if where.labels is None:
        return _read_target(value, where, shown_label)
    by_name = _has_numeric_names(where.labels)
    for name in (value, label_name(value) if by_name else None):
        if isinstance(name, str) and name in where.labels:
            return where.labels.index(name)
    index = as_integer(value)
    if index is not None and not by_name and 0 <= index < len(where.labels):
        return index
    if index == -1:
        raise DataError(f"{shown_label}: {_HIDDEN}")
    similar = [name for name in where.labels if folded_label(name) == folded_label(str(value))]
    hint = f" (did you mean {similar[0]!r}?)" if similar else ""
    raise DataError(f"{shown_label}: unknown label{hint}; allowed: {_allowed(where.labels)}")


def _read_target(value: Any, where: Labelling, shown_label: str) -> float:
    bounded = math.isfinite(where.minimum)
    allowed = f"{where.minimum:g} to {where.maximum:g}" if bounded else "a finite number"
    target = _as_float(value)
    if bounded and target == -1:
        raise DataError(f"{shown_label}: {_HIDDEN}")
    if target is None or not (math.isfinite(target) and where.minimum <= target <= where.maximum):
        raise DataError(f"{shown_label}; allowed: {allowed}")
    return target


def label_name(value: Any) -> str | None:
    """The class name of a label: text unchanged, an integer as its digits, so that 1, 1.0, True
    and the text ``1.0`` are all ``1``. None for anything else."""
    if isinstance(value, str) and not _DECIMAL.fullmatch(value):
        return value
    number = as_integer(value)
    return None if number is None else str(number)


def as_integer(value: Any) -> int | None:
    """An integer, which may be given as a bool, text or (in columns with missing values) a float;
    None for anything else."""
    if isinstance(value, int) or (isinstance(value, str) and _INTEGER.fullmatch(value)):
        return int(value)
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else None


def class_id(value: Prediction) -> Prediction:
    """Convert a prediction to what metrics receive: the class index, or NO_CLASS."""
    return NO_CLASS if isinstance(value, Mapping) else value


def _prediction(value: Prediction, where: Labelling, number: int) -> int | float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if where.labels is None:
        target = _as_float(value) if is_number else None
        if target is not None and math.isfinite(target):
            return target
        raise DataError(f"prediction {number}: {shown(value)}; allowed: a finite number")
    index = as_integer(value) if is_number else None
    if isinstance(value, Mapping) and value.keys() == {"error"}:
        return NO_CLASS
    if index is None or not 0 <= index < len(where.labels):
        allowed = f"a label id, 0 to {len(where.labels) - 1}"
        raise DataError(f"prediction {number}: {shown(value)}; allowed: {allowed}")
    return index


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _has_numeric_names(labels: Sequence[str]) -> bool:
    return any(_INTEGER.fullmatch(name) for name in labels)


def _allowed(labels: Sequence[str]) -> str:
    names = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
    return names if _has_numeric_names(labels) else f"0 to {len(labels) - 1} or {names}"


TASK = Classification()
