"""Predictions as a file: one JSON object a line, in the split's order."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.data.sources import Split
from lorakit.errors import DataError, shown
from lorakit.tasks.base import Prediction, Task

_ALLOWED = '{"prediction": ...} or {"error": ...}, and for wikisql also {"query": {...}}'
#: WikiSQL's own format, and ``error`` also for a class that the task does not have: the task gets
#: the whole object.
_WHOLE = frozenset({"query", "error"})


def score_predictions(task: Task, config: Any, split: Split, file: Path) -> dict[str, float]:
    """The task's metrics of the predictions in ``file``.

    Raises DataError with the line for a prediction that is not one, and for a wrong count.
    """
    predictions = read_predictions(file, len(split), task.prediction_counts(split, config))
    try:
        scores = task.metrics(predictions, split, config)
    except DataError as error:
        numbered = re.match(r"prediction (\d+): ", str(error))
        if numbered is None:
            raise
        rest = str(error)[numbered.end() :]
        raise DataError(f"{file}:{numbered[1]}: {rest}") from error
    if not scores:
        raise DataError(
            f"task.name = {config.name!r}: has no metric that predictions are scored by"
        )
    return scores


def read_predictions(file: Path, rows: int, counts: Sequence[int]) -> list[Prediction]:
    """What stands behind ``prediction`` on each line, or the object with ``query`` or ``error``.

    Raises DataError for a line that is no prediction, and for a number of lines not in ``counts``.
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
        other = [f"; {count} also would do" for count in dict.fromkeys(counts) if count != rows]
        raise DataError(
            f"{file}: {len(predictions)} predictions; the split has {rows} rows{''.join(other)}"
        )
    return predictions


def prediction_lines(predictions: Sequence[Prediction]) -> str:
    """The text that ``read_predictions`` reads; a float keeps every digit."""
    objects = [v if isinstance(v, dict) else {"prediction": v} for v in predictions]
    lines = [json.dumps(value, ensure_ascii=False) for value in objects]
    return "".join(f"{line}\n" for line in lines)


def _read_line(line: str, where: str) -> Prediction:
    try:
        value = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}; allowed: {_ALLOWED}") from error
    if isinstance(value, dict) and "prediction" in value:
        return value["prediction"]
    if isinstance(value, dict) and value.keys() & _WHOLE:
        return value
    raise DataError(f"{where}: {shown(value)}: no key 'prediction'; allowed: {_ALLOWED}")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number that JSON has")
