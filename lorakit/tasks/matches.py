"""Generated texts against the texts of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from lorakit.data.sources import Split
from lorakit.errors import DataError, shown
from lorakit.metrics.exact_match import exact_match
from lorakit.tasks.base import Prediction, Row


def exact_matches(
    predictions: Sequence[Prediction], split: Split, reference: Callable[[Row], str]
) -> dict[str, float]:
    """``exact_match`` with ``reference`` of each row. Raises DataError as ``paired`` does."""
    return {"exact_match": exact_match(*paired(predictions, split, reference))}


def paired(
    predictions: Sequence[Prediction], split: Split, reference: Callable[[Row], str]
) -> tuple[list[str], list[str]]:
    """Predictions and references. Raises DataError for a wrong count, for what is no text, and with
    file and row for a row that has no reference."""
    if len(predictions) != len(split):
        raise DataError(f"{split.source}: {len(predictions)} predictions for {len(split)} rows")
    for number, prediction in enumerate(predictions, 1):
        if not isinstance(prediction, str):
            raise DataError(f"prediction {number}: {shown(prediction)}; allowed: text")
    references: list[str] = []
    try:
        for row in split.rows:
            references.append(reference(row))  # noqa: PERF401 (an error needs the row)
    except DataError as error:
        raise DataError(f"{split.locate(len(references))}: {error}") from error
    return list(predictions), references


def text_scores(
    name: str, predictions: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """The metric ``name`` of ``lorakit/metrics``, with one reference a prediction."""
    if name == "exact_match":
        return {name: exact_match(predictions, references)}
    score = getattr(import_module(f"lorakit.metrics.{name}"), name)
    return {name: float(score(predictions, [[text] for text in references]))}
