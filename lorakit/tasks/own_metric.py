"""Metrics of a user's own: ``./my_metric.py:function``, of predictions and references."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from numbers import Real
from typing import Any

from lorakit.errors import DataError, shown
from lorakit.tasks.base import LOWER_IS_BETTER
from lorakit.tasks.own_code import guarded, is_code, load_attribute


def metric_name(metric: str) -> str:
    """What scores by ``metric`` are called: the function's name, or a known metric's own."""
    return metric.rpartition(":")[2] if is_code(metric) else metric


def metric_digest(metric: str) -> bytes:
    """A hash of the function's file. Raises DataError if it cannot be loaded or called."""
    function, _, digest = load_attribute(metric)
    if not callable(function):
        raise DataError(f"{metric}: is of type {type(function).__name__}; allowed: a function")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise DataError(
            f"{metric}: cannot be called as function(predictions, references): {error}"
        ) from error
    except ValueError:  # of a function in C that does not say what it takes
        pass
    return digest


def own_scores(
    metric: str, predictions: Sequence[Any], references: Sequence[Any]
) -> dict[str, float]:
    """``function(predictions, references)``: a number, or a dict of names to numbers, whose first
    stands under the function's name too. Raises DataError if the function fails or gives anything
    else."""
    function, file, _ = load_attribute(metric)
    with redirect_stdout(sys.stderr):
        result = guarded(function, file)(list(predictions), list(references))
    name = metric_name(metric)
    if isinstance(result, Mapping) and result:
        scores = checked_scores(result, metric)
        return {name: next(iter(scores.values())), **scores}
    return checked_scores({name: result}, metric)


def checked_scores(scores: Any, where: str) -> dict[str, float]:
    """``scores`` as floats. Raises DataError for what is no mapping of names to finite numbers,
    and for the names of what every model is measured by."""
    if not isinstance(scores, Mapping):
        raise DataError(f"{where}: gave {shown(scores)}; allowed: a dict of names to numbers")
    for name, value in scores.items():
        if not (isinstance(name, str) and _is_finite(value)):
            raise DataError(f"{where}: {name} = {shown(value)}; allowed: a finite number")
        if name in LOWER_IS_BETTER:
            raise DataError(f"{where}: {name} is the model's own; allowed: another name")
    return {name: float(value) for name, value in scores.items()}


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False
