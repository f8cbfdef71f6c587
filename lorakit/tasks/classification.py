"""``classification``: predict a class, several classes or a number from a text or a pair of texts,
in any columns.

``LabelledTask`` is the base class that it shares with ``glue``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Hashable, Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from lorakit.data.examples import ClassificationExample, Problem
from lorakit.data.sources import Split
from lorakit.errors import shown
from lorakit.metrics.labels import label_score, require_metrics
from lorakit.metrics.multi_label import MULTI_LABEL_METRICS, multi_label_scores
from lorakit.recipe.sections import TaskSection, Text
from lorakit.tasks.base import (
    Prediction,
    Row,
    Task,
    check_count,
    exclusive,
    required_text,
)
from lorakit.tasks.labelling import (
    ClassWeights,
    Labelling,
    check_class_weights,
    check_distinct,
    declared_labels,
    distinct_names,
    found_labels,
    is_readable,
    names_in,
    read_prediction,
    read_values,
    required_train,
    row_labels,
)


class LabelledTask(Task):
    """A task for an encoder: predict a class or a number from one text or a pair of texts."""

    kind = "encoder"

    @abstractmethod
    def labelling(self, config: Any) -> Labelling:
        """The columns, labels and metrics of ``config``."""

    def columns(self, config: Any) -> tuple[str, ...]:
        return (*self.text_columns(config), *self.labelling(config).label_columns)

    def text_columns(self, config: Any) -> tuple[str, ...]:
        found = self.labelling(config)
        return (found.text,) if found.pair is None else (found.text, found.pair)

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        return self.columns(config)

    def labels(self, config: Any, train: Split | None) -> list[str] | None:
        found = self.labelling(config).labels
        return None if found is None else list(found)

    def problem(self, config: Any) -> Problem | None:
        where = self.labelling(config)
        if where.several:
            return "multi_label_classification"
        return "regression" if where.labels is None else "single_label_classification"

    def strata(self, config: Any, split: Split) -> Sequence[Hashable] | None:
        """The rows' labels; None for a regression."""
        where = self.labelling(config)
        if where.labels is None:
            return None
        columns = [map(repr, split.column(name)) for name in where.label_columns]
        return list(zip(*columns, strict=True))

    def example(self, row: Row, config: Any) -> ClassificationExample:
        where = self.labelling(config)
        return ClassificationExample(
            text=required_text(row, where.text),
            text_pair=None if where.pair is None else required_text(row, where.pair),
            label=read_values([row[name] for name in where.label_columns], where),
        )

    def main_metric(self, config: Any) -> str:
        return self.labelling(config).metrics[0]

    def metric_names(self, config: Any) -> tuple[str, ...] | None:
        return self.labelling(config).metrics

    def check_requirements(self, config: Any) -> None:
        require_metrics(self.labelling(config).metrics)

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """The metrics of ``labelling``: see ``multi_label_scores`` for several labels per row. With
        two classes, F1 is that of class 1; with more, the unweighted mean over the classes (macro).

        A prediction ``{"error": ...}`` is always wrong. A score that is undefined because all
        predictions or labels are equal (a correlation's 0 / 0) is 0. Raises DataError for a
        prediction that is not a label id, or for a regression not a finite number.
        """
        where = self.labelling(config)
        check_count(predictions, split)
        gold = row_labels(split, where)
        read: list[Any] = [
            read_prediction(value, where, number) for number, value in enumerate(predictions, 1)
        ]
        if where.several:
            scores = multi_label_scores(gold, read)
            return {name: scores[name] for name in where.metrics}
        classes = len(where.labels or ())
        return {name: label_score(name, gold, read, classes) for name in where.metrics}


class ClassificationConfig(TaskSection):
    """The keys of ``classification``.

    If ``labels`` is null, the names are taken from the training split and sorted; integers, as
    numbers or text, are names there too (1 and 2 are the classes ``1`` and ``2``). If any name is
    an integer, labels are always names, never ids. ``class_weights`` weigh the training loss: the
    cross entropy by the weight of the row's class, over the sum of these weights; with several
    labels per row, those of the classes that it has.
    """

    name: Text = "classification"
    text_column: Text = "text"
    """The column of the text."""
    text_pair_column: Text | None = None
    """The column of the second text of a pair; null: one text."""
    label_column: Text = "label"
    """The column of the label."""
    labels: Annotated[list[Text], Field(min_length=2)] | None = None
    """The class names by id; a row's label is a name or an id. Null takes the names from the
    training split."""
    multi_label: bool = False
    """A row has several labels or none: a list of names or ids."""
    label_columns: Annotated[list[Text], Field(min_length=2)] | None = None
    """Columns of 0 and 1, one per class and named as it, instead of label_column."""
    regression: bool = False
    """The label is a number."""
    class_weights: ClassWeights = None
    """The weights of the classes in the training loss: balanced, by name, or a list in the order of
    the classes."""
    dataset_name: Text | None = None
    """A dataset on the Hub, read if path is null."""
    dataset_config_name: Text | None = None
    """The configuration of the dataset on the Hub."""

    @model_validator(mode="after")
    def _labels_fit(self) -> ClassificationConfig:
        if self.labels is not None and self.regression:
            raise exclusive("labels", "regression: true")
        if self.regression and (self.multi_label or self.label_columns):
            several = "multi_label: true" if self.multi_label else "label_columns"
            raise exclusive(several, "regression: true")
        if self.regression and self.class_weights is not None:
            raise exclusive("class_weights", "regression: true")
        check_class_weights(self.class_weights, self.labels or self.label_columns)
        columns = self.label_columns or []
        check_distinct("label_columns", columns)
        if columns and self.label_column != "label":
            raise exclusive("label_column", "label_columns")
        if columns and self.labels not in (None, columns):
            raise ValueError(
                f"labels = {shown(self.labels)}: the classes are those of label_columns; allowed: "
                "null, or the same list"
            )
        check_distinct("labels", self.labels)
        return self


class Classification(LabelledTask):
    names = ("classification",)
    summary = "label or number of a text or pair"
    Config = ClassificationConfig

    def column_key(self, config: Any, column: str) -> str | None:
        if column in (config.label_columns or ()):
            return "label_columns"
        return super().column_key(config, column)

    def labelling(self, config: Any) -> Labelling:
        columns = (config.text_column, config.text_pair_column, config.label_column)
        if config.regression:
            return Labelling(*columns, None, ("pearson", "spearmanr"))
        labels, flags = tuple(config.labels or ()), tuple(config.label_columns or ())
        if config.multi_label or flags:
            return Labelling(
                *columns, labels or flags, MULTI_LABEL_METRICS, several=True, flags=flags
            )
        return Labelling(*columns, labels, ("accuracy", "f1"))

    def labels(self, config: Any, train: Split | None) -> list[str] | None:
        if config.regression:
            return None
        if names := config.labels or config.label_columns:
            return list(names)
        train = required_train(train)
        return declared_labels(train, config.label_column) or found_labels(
            train, config.label_column, config.on_bad_row == "skip", config.multi_label
        )

    def accepts_labels(self, config: Any, split: Split) -> bool:
        return is_readable(lambda: row_labels(split, self.labelling(config)))

    def labels_of_rows(self, config: Any, splits: Sequence[Split]) -> list[str] | None:
        if config.label_columns:
            return list(config.label_columns)
        values = (value for split in splits for value in split.column(config.label_column))
        return distinct_names(
            values, lambda value: names_in(value, config.multi_label), config.on_bad_row == "skip"
        )

    def resolve(self, config: Any, train: Split | None) -> Any:
        return config.model_copy(update={"labels": self.labels(config, train)})


TASK = Classification()
