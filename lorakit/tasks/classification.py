"""``classification``: a text or a pair of texts, and a class or a number, in your own columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from lorakit.data.sources import Split
from lorakit.errors import DataError
from lorakit.recipe.sections import TaskSection, Text
from lorakit.tasks.labelled import LabelledTask, Labelling, as_integer, label_name, read_label


class ClassificationConfig(TaskSection):
    """``text_column``, ``text_pair_column`` (null: one text) and ``label_column`` name the columns.

    ``labels`` are the class names by id; a row holds the name or the id. Null takes the names from
    the train split, in order; a whole number there is a name too, whether a number or text (1 and
    2 are the classes ``1`` and ``2``). Where a name is a whole number, a row holds names only.
    ``regression: true`` makes the label a number. ``dataset_name`` and ``dataset_config_name`` are
    a Hub data set, read when ``path`` is null.
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
            raise ValueError("labels and regression: true contradict each other; give one")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("labels: duplicate name")
        return self


class Classification(LabelledTask):
    names = ("classification",)
    summary = "a text or a pair of texts -> a class or a number, columns of your own"
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
                "task.labels: null, and there is no train split to take them from; "
                "allowed: a list of names"
            )
        return _declared(train, config.label_column) or _found(
            train, config.label_column, config.on_bad_row == "skip"
        )

    def reads_labels(self, config: Any, split: Split) -> bool:
        where = self.labelling(config)
        try:
            for value in split.column(where.label):
                read_label(value, where)
        except DataError:
            return False
        return True

    def label_names(self, config: Any, splits: Sequence[Split]) -> list[str] | None:
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


def _declared(train: Split, column: str) -> list[str] | None:
    """The names that a Hub data set declares for its ids."""
    feature = (getattr(train.rows, "features", None) or {}).get(column)
    names = getattr(feature, "names", None)
    return list(names) if names else None


def _found(train: Split, column: str, skip_bad: bool) -> list[str]:
    names = set()
    numbers = False
    for index, value in enumerate(train.column(column)):
        name = label_name(value)
        if not name and skip_bad:
            continue
        if not name:
            raise DataError(
                f"{train.locate(index)}: {column} = {value!r}: allowed: a name or a whole number; "
                "for other numbers, set task.regression: true, or list them as names in task.labels"
            )
        names.add(name)
        numbers = numbers or not isinstance(value, str)
    if len(names) < 2:
        held = f"one label only: {min(names)}" if names else "no label"
        raise DataError(f"{train.source}: column {column!r} holds {held}")
    if numbers and any(as_integer(name) is None for name in names):
        raise DataError(f"{train.source}: column {column!r} holds both names and numbers")
    return sorted(names, key=label_order)


def label_order(name: str) -> tuple[bool, int, str]:
    """Sorts class names: numbers first, by value; then the others by the alphabet."""
    number = as_integer(name)
    return (number is None, number or 0, name)


TASK = Classification()
