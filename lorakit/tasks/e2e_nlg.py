"""``e2e_nlg``: describe a restaurant's meaning representation (Novikova et al. 2017).

A row as text, with the loss on what follows ``text:`` and on its EOS::

    name[The Vaults], eatType[pub], near[Café Adriatic]
    text: The Vaults is a pub near Café Adriatic.

Scores are those of tuetschek/e2e-metrics except METEOR, which needs its Java program and paraphrase
table.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from lorakit.data.examples import Segment, TextExample
from lorakit.data.sources import Split
from lorakit.errors import DataError, shown
from lorakit.metrics.coco_caption import cider, rouge_l
from lorakit.metrics.mteval import bleu, nist
from lorakit.recipe.sections import NonNegativeInt, PositiveInt, Text
from lorakit.tasks.base import (
    GenerationSection,
    Prediction,
    Row,
    Task,
    check_texts,
    map_rows,
)

_SOURCE, _TARGET = "meaning_representation", "human_reference"


class E2eNlgConfig(GenerationSection):
    """No additional keys; beam search as in the LoRA paper (section D.3). ``path`` is required; the
    columns are ``meaning_representation`` and ``human_reference``."""

    name: Text = "e2e_nlg"
    max_new_tokens: PositiveInt = 64
    num_beams: PositiveInt = 10
    length_penalty: float = 0.9
    no_repeat_ngram_size: NonNegativeInt = 4


class E2eNlg(Task):
    names = ("e2e_nlg",)
    summary = "a restaurant described from facts"
    source = "Novikova et al. 2017"
    Config = E2eNlgConfig
    kind = "causal"

    def columns(self, config: Any) -> tuple[str, ...]:
        return (_SOURCE, _TARGET)

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        return self.columns(config)

    def example(self, row: Row, config: Any) -> TextExample:
        reference = _text(row, _TARGET)
        return TextExample(
            (Segment(_prompt(row), trained=False), Segment(f" {reference}", trained=True))
        )

    def prompt(self, row: Row, config: Any) -> TextExample:
        return TextExample((Segment(_prompt(row), trained=False),), eos=False)

    def stop_texts(self, config: Any) -> tuple[str, ...]:
        return ("\n",)  # a reference is one line

    def main_metric(self, config: Any) -> str:
        return "bleu"

    def prediction_counts(self, split: Split, config: Any) -> tuple[int, ...]:
        return (len(split), len(_instances(split)))

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """``bleu``, ``nist``, ``rouge_l`` and ``cider`` of the corpus.

        The rows of one meaning representation form an instance with several references; instances
        are in the order of their first rows. ``predictions`` has one text per instance, as in the
        challenge's files, or one per row, of which the first of each instance is scored (with beam
        search, equal inputs have equal outputs). Raises DataError for a prediction that is not
        text.
        """
        check_texts(predictions)
        instances = _instances(split)
        if len(predictions) == len(split):
            predictions = [predictions[rows[0]] for rows in instances]
        elif len(predictions) != len(instances):
            raise DataError(
                f"{split.source}: {len(predictions)} predictions for {len(split)} rows with "
                f"{len(instances)} distinct inputs"
            )
        targets = _column(split, _TARGET)
        references = [[targets[row] for row in rows] for rows in instances]
        scores = {"bleu": bleu, "nist": nist, "rouge_l": rouge_l, "cider": cider}
        return {name: score(predictions, references) for name, score in scores.items()}


def _instances(split: Split) -> list[list[int]]:
    """The row numbers of each meaning representation."""
    rows: dict[str, list[int]] = {}
    for index, source in enumerate(_column(split, _SOURCE)):
        rows.setdefault(source, []).append(index)
    return list(rows.values())


def _prompt(row: Row) -> str:
    return f"{_text(row, _SOURCE)}\ntext:"


def _column(split: Split, column: str) -> list[str]:
    return map_rows(split, split.column(column), lambda value: _text({column: value}, column))


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"column {column!r} = {shown(value)}; allowed: non-empty text")
    return " ".join(value.split())


TASK = E2eNlg()
