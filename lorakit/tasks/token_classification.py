"""``token_classification``: predict the tag of each word of a text: names, parts of speech, chunks.

A word's tag is learned and predicted at its first token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from lorakit.data.examples import Problem, WordsExample
from lorakit.data.sources import Split
from lorakit.errors import BadPrediction, DataError, shown
from lorakit.metrics.entities import ENTITY_METRICS, entity_scores, is_entity_tag, tag_accuracy
from lorakit.recipe.sections import TaskSection, Text
from lorakit.tasks.base import Prediction, Row, Task, check_count, map_rows
from lorakit.tasks.labelling import (
    ClassWeights,
    Labelling,
    as_integer,
    check_class_weights,
    check_distinct,
    declared_labels,
    distinct_names,
    is_readable,
    listed_values,
    read_label,
    required_train,
)


class TokenClassificationConfig(TaskSection):
    """The keys of ``token_classification``. A row's tags are names or ids. ``class_weights`` weigh
    the training loss: the cross entropy by the weight of the word's tag, over the sum of these
    weights.
    """

    name: Text = "token_classification"
    tokens_column: Text = "tokens"
    """The column of the words, a list."""
    tags_column: Text = "tags"
    """The column of the tags, a list of the same length."""
    labels: Annotated[list[Text], Field(min_length=2)] | None = None
    """The names of the tags by id; null takes those that the dataset declares, or those in the
    training split."""
    class_weights: ClassWeights = None
    """The weights of the tags in the training loss: balanced, by name, or a list in the order of
    the tags."""
    dataset_name: Text | None = None
    """A dataset on the Hub, read if path is null."""
    dataset_config_name: Text | None = None
    """The configuration of the dataset on the Hub."""

    @model_validator(mode="after")
    def _labels_fit(self) -> TokenClassificationConfig:
        check_distinct("labels", self.labels)
        check_class_weights(self.class_weights, self.labels)
        return self


class TokenClassification(Task):
    names = ("token_classification",)
    summary = "tags of words, such as entities"
    Config = TokenClassificationConfig
    kind = "encoder"

    def columns(self, config: Any) -> tuple[str, ...]:
        return (config.tokens_column, config.tags_column)

    def text_columns(self, config: Any) -> tuple[str, ...]:
        return (config.tokens_column,)

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        return self.columns(config)

    def problem(self, config: Any) -> Problem | None:
        return "token_classification"

    def resolve(self, config: Any, train: Split | None) -> Any:
        return config.model_copy(update={"labels": self.labels(config, train)})

    def labels(self, config: Any, train: Split | None) -> list[str] | None:
        if config.labels is not None:
            return list(config.labels)
        train = required_train(train)
        if names := declared_labels(train, config.tags_column):
            return names
        names = self.labels_of_rows(config, [train])
        if names is None:
            raise DataError(
                f"{train.source}: column {config.tags_column!r} has tags that are not names; "
                "hint: list the names in task.labels, in the order of the ids"
            )
        if len(names) < 2:
            raise DataError(f"{train.source}: column {config.tags_column!r} has fewer than 2 tags")
        return sorted(names, key=_tag_order)

    def labels_of_rows(self, config: Any, splits: Sequence[Split]) -> list[str] | None:
        values = (value for split in splits for value in split.column(config.tags_column))
        return distinct_names(values, _tag_names, config.on_bad_row == "skip")

    def accepts_labels(self, config: Any, split: Split) -> bool:
        return is_readable(lambda: self._gold(split, config))

    def example(self, row: Row, config: Any) -> WordsExample:
        words = listed_values(row[config.tokens_column])
        if words is None or not all(isinstance(word, str) and word.strip() for word in words):
            value = row[config.tokens_column]
            raise DataError(
                f"{config.tokens_column} = {shown(value)}; allowed: a list of words, none of them "
                "empty"
            )
        tags = self._tags(row[config.tags_column], config)
        if len(words) != len(tags):
            raise DataError(
                f"{config.tokens_column} has length {len(words)}, and {config.tags_column} "
                f"{len(tags)}; allowed: one tag per word"
            )
        return WordsExample.of(tuple(words), tags)

    def main_metric(self, config: Any) -> str:
        return self.metric_names(config)[0]

    def metric_names(self, config: Any) -> tuple[str, ...]:
        """The names of the scores: of entities only if all tags are those of entities."""
        of_entities = all(is_entity_tag(name) for name in config.labels or ())
        return ENTITY_METRICS if of_entities else ("accuracy",)

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """``entity_scores``, or the accuracy alone if a tag is not of the form ``O``, ``B-TYPE``,
        ``I-TYPE``. A prediction is a list of ids or names, one per word; null is always wrong.
        Raises DataError for any other."""
        check_count(predictions, split)
        names = config.labels
        gold = [[names[tag] for tag in tags] for tags in self._gold(split, config)]
        found = [
            _predicted(value, len(tags), names, number)
            for number, (value, tags) in enumerate(zip(predictions, gold, strict=True), 1)
        ]
        if self.metric_names(config) == ENTITY_METRICS:
            return entity_scores(gold, found)
        return {"accuracy": tag_accuracy(gold, found)}

    def _gold(self, split: Split, config: Any) -> list[tuple[int, ...]]:
        values = split.column(config.tags_column)
        return map_rows(split, values, lambda value: self._tags(value, config))

    def _tags(self, value: Any, config: Any) -> tuple[int, ...]:
        tags = listed_values(value)
        if not tags:
            raise DataError(f"{config.tags_column} = {shown(value)}; allowed: a list of tags")
        where = Labelling("", None, config.tags_column, tuple(config.labels), ())
        return tuple(int(read_label(tag, where)) for tag in tags)


def _tag_names(value: Any) -> list[str] | None:
    """The tags of a row; none for a value that is not a list, and None if one is not a name."""
    tags = listed_values(value) or []
    are_names = all(isinstance(tag, str) and tag and as_integer(tag) is None for tag in tags)
    return tags if are_names else None


def _tag_order(name: str) -> tuple[bool, str, str]:
    """Sort key for the tags of words: ``O`` first, then ``B-TYPE`` and ``I-TYPE`` type by type."""
    prefix, _, kind = name.partition("-")
    return (name != "O", kind, prefix)


def _predicted(value: Any, count: int, names: Sequence[str], number: int) -> list[str | None]:
    if not isinstance(value, list) or len(value) != count:
        problem = f"{len(value)} tags" if isinstance(value, list) else shown(value)
        raise BadPrediction(number, problem, f"a list of {count} tags, one per word")
    found: list[str | None] = []
    for tag in value:
        name = tag
        if isinstance(tag, int) and not isinstance(tag, bool) and 0 <= tag < len(names):
            name = names[tag]
        if name is not None and name not in names:
            allowed = f"an id, 0 to {len(names) - 1}, a name, or null"
            raise BadPrediction(number, shown(tag), allowed)
        found.append(name)
    return found


TASK = TokenClassification()
