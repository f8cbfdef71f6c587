"""Write, read and score predictions: one JSON object per line, in the split's order.

No tensor library is imported, since scoring a file needs no model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit import registry
from lorakit.data.sources import Split
from lorakit.errors import BadPrediction, DataError, counted, shown
from lorakit.notes import Say, to_stderr
from lorakit.pipeline.task_data import load_task_data
from lorakit.recipe.sections import Recipe
from lorakit.tasks.base import Prediction, Task

_ALLOWED = '{"prediction": ...} or {"error": ...}, and for wikisql also {"query": {...}}'
#: An object with one of these keys is passed to the task unchanged: WikiSQL's format, and an answer
#: that is not one of the task's classes.
_OBJECT_KEYS = frozenset({"query", "error"})


@dataclass(frozen=True)
class SplitEvaluation:
    """The scores of one split.

    ``predictions`` are in the split's order; empty if only the loss was computed.
    """

    task: str
    split: str
    examples: int
    metrics: dict[str, float]
    predictions: list[Prediction]


def score_predictions(
    recipe: Recipe,
    file: Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    say: Say = to_stderr,
) -> SplitEvaluation:
    """Score the predictions in ``file`` with the metrics of the recipe's task.

    ``split`` and ``limit`` are those of ``evaluate``; notes go to ``say``. Raises DataError, with
    the line, for a prediction that the task cannot read, and for a wrong number of them.
    """
    task: Task = registry.task(recipe.task.name)
    task.check_requirements(recipe.task)
    data = load_task_data(recipe, split, limit=limit, say=say)
    scores = score_file(data.task, data.config, data.split, file)
    return SplitEvaluation(data.config.name, data.split.name, len(data.split), scores, [])


def score_file(task: Task, config: Any, split: Split, file: Path) -> dict[str, float]:
    """Return the task's metrics of the predictions in ``file``.

    Raises DataError, with the line, for a prediction that the task cannot read, and for a wrong
    number of them.
    """
    predictions = read_predictions(file, len(split), task.prediction_counts(split, config))
    try:
        scores = task.metrics(predictions, split, config)
    except BadPrediction as error:
        line = f"{file}:{error.number}"
        raise DataError(error.problem, about=line, allowed=error.allowed) from error
    if not scores:
        raise DataError(
            f"task.name = {shown(config.name)}: the task has no metric to score predictions"
        )
    return scores


def read_predictions(file: Path, rows: int, counts: Sequence[int]) -> list[Prediction]:
    """Return each line's ``prediction``, or the whole object if it has ``query`` or ``error``.

    Raises DataError for an invalid line, and for a number of lines not in ``counts``.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"--predictions {file}: {reason}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    predictions = [_read_line(line, f"{file}:{number}") for number, line in enumerate(lines, 1)]
    if len(predictions) not in counts:
        other = "".join(f" or {count:,}" for count in dict.fromkeys(counts) if count != rows)
        raise DataError(
            f"{file}: {counted(len(predictions), 'prediction')}; the split has "
            f"{counted(rows, 'row')}; "
            f"allowed: {rows}{other}"
        )
    return predictions


def prediction_lines(predictions: Sequence[Prediction]) -> str:
    """Return the text that ``read_predictions`` reads; floats keep every digit."""
    objects = [v if isinstance(v, dict) else {"prediction": v} for v in predictions]
    lines = [json.dumps(value, ensure_ascii=False) for value in objects]
    return "".join(f"{line}\n" for line in lines)


def _read_line(line: str, where: str) -> Prediction:
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}; allowed: {_ALLOWED}") from error
    if isinstance(value, dict) and "prediction" in value:
        return value["prediction"]
    if isinstance(value, dict) and value.keys() & _OBJECT_KEYS:
        return value
    raise DataError(f"{where}: {shown(value)}: missing key 'prediction'; allowed: {_ALLOWED}")


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")
