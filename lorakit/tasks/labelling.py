"""The labels of rows and predictions: class names and ids, numbers, several classes per row."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lorakit.data.sources import Split
from lorakit.errors import BadPrediction, DataError, did_you_mean, shown
from lorakit.recipe.sections import Text
from lorakit.tasks.base import Prediction, map_rows
from lorakit.tasks.checks import folded_label

#: A class index; the target of a regression; or, of a row with several labels, a 0 or 1 per class.
LabelValue = int | float | tuple[int, ...]

#: Stands for a predicted class that only the base's head has, given as {"error": ...}.
NO_CLASS = -1
_Weight = Annotated[float, Field(gt=0, le=1e6)]
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_HIDDEN = "the labels are hidden, as in a benchmark's test split"
_SEVERAL_HINT = "for several labels per row, set task.multi_label: true"


def _text_keys(value: Any) -> Any:
    """Take keys like 1, as YAML reads them, for the names of classes."""
    if not isinstance(value, dict):
        return value
    return {str(k) if type(k) is int else k: weight for k, weight in value.items()}


@dataclass(frozen=True)
class Labelling:
    """The columns of a row's texts and label. ``labels`` are the class names by index, None for
    regression; ``minimum`` and ``maximum`` bound the target of a regression. The first of
    ``metrics`` is the main one. With ``several``, a row's label is a list of classes or, if
    ``flags`` is not empty, a 0 or 1 in each of these columns, one per class."""

    text: str
    pair: str | None
    label: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    minimum: float = -math.inf
    maximum: float = math.inf
    several: bool = False
    flags: tuple[str, ...] = ()

    @property
    def label_columns(self) -> tuple[str, ...]:
        return self.flags or (self.label,)


#: ``balanced``, the weight of each class by name (1 for a class without), or a list in their order.
ClassWeights = (
    Literal["balanced"]
    | Annotated[dict[Text, _Weight], BeforeValidator(_text_keys)]
    | list[_Weight]
    | None
)


def named_weights(
    given: Mapping[str, float] | Sequence[float], labels: Sequence[str]
) -> tuple[float, ...]:
    """The weight of each class. Raises ValueError for an unknown name, and a list of another
    length."""
    if not isinstance(given, Mapping):
        if len(given) != len(labels):
            raise ValueError(f"has {len(given)} weights for {len(labels)} classes")
        return tuple(given)
    if unknown := [name for name in given if name not in labels]:
        message = did_you_mean(f"unknown class {unknown[0]!r}", unknown[0], labels)
        raise ValueError(f"{message}; allowed: {', '.join(labels)}")
    return tuple(given.get(name, 1.0) for name in labels)


def check_class_weights(given: ClassWeights, labels: Sequence[str] | None) -> None:
    """Raise ValueError for weights that do not fit the recipe's ``labels``, if it has them."""
    if given is not None and given != "balanced" and labels is not None:
        try:
            named_weights(given, labels)
        except ValueError as error:
            raise ValueError(f"class_weights: {error}") from error


def check_distinct(key: str, names: Sequence[str] | None) -> None:
    """Raise ValueError for a name that is twice in the list under ``key``."""
    if names is not None and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{key}: duplicate name {twice!r}")


def required_train(train: Split | None) -> Split:
    """The split to take class names from. Raises DataError if there is none."""
    if train is None:
        raise DataError(
            "task.labels = null: there is no training split to take the names from; "
            "allowed: a list of names"
        )
    return train


def is_readable(read: Callable[[], object]) -> bool:
    """Whether ``read`` reads labels without a DataError."""
    try:
        read()
    except DataError:
        return False
    return True


def row_labels(split: Split, where: Labelling) -> list[Any]:
    """The label of each row. Raises DataError, with file and row, for one that cannot be read."""
    values = zip(*(split.column(name) for name in where.label_columns), strict=True)
    return map_rows(split, values, lambda value: read_values(value, where))


def read_values(values: Sequence[Any], where: Labelling) -> LabelValue:
    """The label of a row, given the values of ``where.label_columns``. Raises DataError."""
    if where.flags:
        return tuple(map(_read_flag, values, where.flags))
    (value,) = values
    return _read_classes(value, where) if where.several else read_label(value, where)


def flagged_classes(flags: Sequence[int]) -> list[int]:
    """The indices of the classes whose flag is 1."""
    return [index for index, flag in enumerate(flags) if flag]


def declared_labels(train: Split, column: str) -> list[str] | None:
    """The names that a Hub dataset declares for its ids."""
    feature = (getattr(train.rows, "features", None) or {}).get(column)
    names = getattr(getattr(feature, "feature", feature), "names", None)  # a list of ids has one
    return list(names) if names else None


def found_labels(train: Split, column: str, skip_bad: bool, several: bool) -> list[str]:
    """The class names in the rows, in order. Raises DataError for a row without, and if there are
    fewer than two."""
    names: set[str] = set()
    numbers = False
    for index, value in enumerate(train.column(column)):
        found = names_in(value, several)
        if found is None and skip_bad:
            continue
        if found is None:
            raise DataError(
                f"{train.locate(index)}: {column} = {shown(value)}; allowed: "
                f"{_names_allowed(value, several)}"
            )
        names.update(found)
        values = listed_values(value) if several else [value]
        numbers = numbers or any(not isinstance(each, str) for each in values or ())
    if len(names) < 2:
        few = f"only one label, {min(names)}" if names else "no labels"
        raise DataError(f"{train.source}: column {column!r} has {few}")
    if numbers and any(as_integer(name) is None for name in names):
        raise DataError(f"{train.source}: column {column!r} mixes names and numbers")
    return sorted(names, key=label_order)


def distinct_names(
    values: Iterable[Any], names_of: Callable[[Any], Sequence[str] | None], skip_bad: bool
) -> list[str] | None:
    """The class names in the labels of rows, each once; None if ``names_of`` returns None for one,
    unless bad rows are skipped."""
    found: dict[str, None] = {}
    for value in values:
        names = names_of(value)
        if names is None and not skip_bad:
            return None
        found |= dict.fromkeys(names or ())
    return list(found)


def names_in(value: Any, several: bool) -> list[str] | None:
    """The class names of a row's label; None if it is not a name or, with ``several``, a list of
    names."""
    values = listed_values(value) if several else [value]
    names = None if values is None else [label_name(each) for each in values]
    return None if names is None or not all(names) else [name for name in names if name]


def _names_allowed(value: Any, several: bool) -> str:
    if several:
        return "a list of names or whole numbers, empty for a row without labels"
    if value is None or not str(value).strip():
        return "a name or a whole number"
    hint = "for other numbers, set task.regression: true, or list them as names in task.labels"
    return f"a name or a whole number; {hint if listed_values(value) is None else _SEVERAL_HINT}"


def listed_values(value: Any) -> list[Any] | None:
    """The elements of a list, which may be given as JSON; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return list(value) if isinstance(value, (list, tuple)) else None


def label_order(name: str) -> tuple[bool, int, str]:
    """Sort key for class names: integers by value, then the others alphabetically."""
    number = as_integer(name)
    return (number is None, number or 0, name)


def read_label(value: Any, where: Labelling) -> int | float:
    """The class index, or the target of a regression. A class is given by its name or its id (a
    number or its text); only by its name if any name is an integer.

    Raises DataError if the value is missing, hidden (-1), unknown, out of range or not finite.
    """
    if where.labels is not None and isinstance(value, str) and value and value in where.labels:
        return where.labels.index(value)  # the usual case, and once per word
    shown_label = f"{where.label} = {shown(value)}"
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{shown_label}: the label is missing")
    if where.labels is None:
        return _read_target(value, where, shown_label)
    by_name = _has_numeric_names(where.labels)
    if by_name and (name := label_name(value)) in where.labels:
        return where.labels.index(name)
    index = as_integer(value)
    if index is not None and not by_name and 0 <= index < len(where.labels):
        return index
    if index == -1:
        raise DataError(f"{shown_label}: {_HIDDEN}")
    similar = [name for name in where.labels if folded_label(name) == folded_label(str(value))]
    hint = f" (did you mean {similar[0]!r}?)" if similar else ""
    allowed = _allowed(where.labels)
    if isinstance(value, list):
        allowed += f"; {_SEVERAL_HINT}"
    raise DataError(f"{shown_label}: unknown label{hint}; allowed: {allowed}")


def _read_classes(value: Any, where: Labelling) -> tuple[int, ...]:
    """A 0 or 1 for each class, given a list of names and ids, which may be empty."""
    assert where.labels is not None, "several labels are classes"
    values = listed_values(value)
    if values is None:
        raise DataError(
            f"{where.label} = {shown(value)}; allowed: a list of labels, empty for a row without"
        )
    found = {read_label(each, where) for each in values}
    return tuple(int(index in found) for index in range(len(where.labels)))


def _read_flag(value: Any, column: str) -> int:
    flag = as_integer(value)
    if flag not in (0, 1):
        raise DataError(f"{column} = {shown(value)}; allowed: 0, 1, true, false")
    return int(flag)


def _read_target(value: Any, where: Labelling, shown_label: str) -> float:
    bounded = math.isfinite(where.minimum)
    allowed = f"{where.minimum:g} to {where.maximum:g}" if bounded else "a finite number"
    target = as_float(value)
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


def for_metric(value: Prediction) -> Prediction:
    """Convert a prediction to what metrics receive: the class index, or NO_CLASS."""
    return NO_CLASS if isinstance(value, Mapping) else value


def read_prediction(value: Prediction, where: Labelling, number: int) -> LabelValue:
    """A prediction as ``read_label`` returns labels; NO_CLASS for ``{"error": ...}``. ``number``
    counts predictions from 1. Raises DataError."""
    if where.several:
        return _predicted_classes(value, where, number)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if where.labels is None:
        target = as_float(value) if is_number else None
        if target is not None and math.isfinite(target):
            return target
        raise BadPrediction(number, shown(value), "a finite number")
    index = as_integer(value) if is_number else None
    if isinstance(value, Mapping) and value.keys() == {"error"}:
        return NO_CLASS
    if index is None or not 0 <= index < len(where.labels):
        allowed = f"a label id, 0 to {len(where.labels) - 1}"
        raise BadPrediction(number, shown(value), allowed)
    return index


def _predicted_classes(value: Prediction, where: Labelling, number: int) -> tuple[int, ...]:
    assert where.labels is not None, "several labels are classes"
    ids = range(len(where.labels))
    by_name = {name: index for index, name in enumerate(where.labels)}
    found = set()
    for each in value if isinstance(value, list) else [None]:
        index = by_name.get(each) if isinstance(each, str) else each
        if isinstance(index, bool) or index not in ids:
            allowed = f"a list of label ids, 0 to {len(ids) - 1}, or names"
            raise BadPrediction(number, shown(value), allowed)
        found.add(index)
    return tuple(int(index in found) for index in ids)


def as_float(value: Any) -> float | None:
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
