"""Metrics of a user's own: ``./my_metric.py:function``, of predictions and references.

A task in a YAML file: a ``kind``, what its keys are by default, and what it is scored by.

The keys are those of the built-in task of that kind, so that a recipe which names the file may set
each of them still.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError, model_validator

from lorakit.data.sources import Split
from lorakit.errors import DataError, RecipeError, shown
from lorakit.recipe.diagnostics import Fault, did_you_mean, explain
from lorakit.recipe.sections import TaskSection
from lorakit.recipe.yaml_source import read_yaml
from lorakit.tasks.base import LOWER_IS_BETTER, Prediction, Task, paired, text_scores
from lorakit.tasks.classification import Classification, Labelling, class_id, read_label
from lorakit.tasks.completion import Completion
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


_TEXT_METRICS = ("exact_match", "bleu", "nist", "rouge_l", "cider")
_CLASS_METRICS = ("accuracy", "f1", "matthews_correlation")
_NUMBER_METRICS = ("pearson", "spearmanr")
#: The keys that a built-in task does not have.
_OWN_KEYS = ("kind", "metric")


class OwnCompletion(Completion):
    """``metrics`` are scored on generated text, the first is the main one."""

    scored_by: ClassVar[tuple[str, ...]]

    def main_metric(self, config: Any) -> str:
        return metric_name(self.scored_by[0]) if self.generates(config) else "loss"

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """Every metric of the file. Raises DataError for a prediction that is no text."""
        pairs = paired(predictions, split, lambda row: self.completion(row, config))
        scores: dict[str, float] = {}
        for name in self.scored_by:
            scores |= own_scores(name, *pairs) if is_code(name) else text_scores(name, *pairs)
        return scores


class OwnClassification(Classification):
    """A function of the user's gets class indices, or numbers where it is a regression."""

    scored_by: ClassVar[tuple[str, ...]]

    def labelling(self, config: Any) -> Labelling:
        known = tuple(name for name in self.scored_by if not is_code(name))
        return replace(super().labelling(config), metrics=known)

    def main_metric(self, config: Any) -> str:
        return metric_name(self.scored_by[0])

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """Every metric of the file. Raises DataError for a prediction that is no label id."""
        scores = super().metrics(predictions, split, config)
        where = self.labelling(config)
        gold = [read_label(value, where) for value in split.column(where.label)]
        for name in self.scored_by:
            if is_code(name):
                scores |= own_scores(name, [class_id(value) for value in predictions], gold)
        return scores


_KINDS: dict[str, type[OwnCompletion] | type[OwnClassification]] = {
    "completion": OwnCompletion,
    "classification": OwnClassification,
}


def load_yaml_task(file: Path) -> Task:
    """The task of a YAML file. Raises RecipeError with every problem of the file."""
    source = read_yaml(file)
    digest = hashlib.sha256(repr((source.data, source.problems)).encode()).digest()
    task = _task(file.resolve(), digest, str(file))
    for name in filter(is_code, task.scored_by):
        digest += metric_digest(name)
    task.digest = hashlib.sha256(digest).digest()
    return task


@lru_cache(maxsize=32)
def _task(path: Path, digest: bytes, shown: str) -> OwnCompletion | OwnClassification:
    """One object, and one class of its config, for a file as it stands."""
    source = read_yaml(Path(shown))
    kind = _KINDS.get(str(source.data.get("kind")))
    if kind is None:
        faults = [_unknown_kind(source.data)]
    else:
        faults = [*_key_faults(kind.Config, source.data), *_metric_faults(source.data)]
    if source.problems or faults:
        located = [fault.locate(source) for fault in faults]
        raise RecipeError(sorted((*source.problems, *located), key=lambda p: p.line or 0))
    assert kind is not None, "else it is a fault"
    given = {key: value for key, value in source.data.items() if key not in _OWN_KEYS}
    own = {"Config": _with_defaults(kind.Config, given), "scored_by": _metrics(source.data)}
    task: OwnCompletion | OwnClassification = type(kind.__name__, (kind,), own)()
    return task


def _with_defaults(section: type[TaskSection], given: Mapping[str, Any]) -> type[TaskSection]:
    """``section`` with the file's values in place of its defaults."""

    class Config(section):  # type: ignore[valid-type, misc]
        @model_validator(mode="before")
        @classmethod
        def _fill(cls, data: Any) -> Any:
            return {**given, **data} if isinstance(data, dict) else data

    Config.__name__ = section.__name__
    return Config


def _unknown_kind(data: Mapping[str, Any]) -> Fault:
    kind, allowed = data.get("kind"), ", ".join(_KINDS)
    if "kind" not in data:
        return Fault(("kind",), "is required", allowed=allowed)
    return Fault(("kind",), did_you_mean("unknown kind", kind, _KINDS), kind, True, allowed)


def _key_faults(section: type[TaskSection], data: Mapping[str, Any]) -> Iterator[Fault]:
    known = [*_OWN_KEYS, *(key for key in section.model_fields if key != "name")]
    for key, value in data.items():
        if key not in known:
            yield Fault((key,), did_you_mean("unknown key", key, known), value, True,
                        ", ".join(known))  # fmt: skip
    rest = {key: data[key] for key in data if key in known and key not in _OWN_KEYS}
    try:
        section.model_validate({**rest, "name": "own"})
    except ValidationError as error:
        yield from explain(section, rest, error)


def _metrics(data: Mapping[str, Any]) -> tuple[str, ...]:
    given = data.get("metric")
    if given is None:
        if data["kind"] == "completion":
            return ("exact_match",)
        return _NUMBER_METRICS if data.get("regression") is True else ("accuracy", "f1")
    return (given,) if isinstance(given, str) else tuple(given)


def _metric_faults(data: Mapping[str, Any]) -> Iterator[Fault]:
    known: tuple[str, ...] = _TEXT_METRICS
    if data["kind"] == "classification":
        known = _NUMBER_METRICS if data.get("regression") is True else _CLASS_METRICS
    allowed = f"{', '.join(known)}, ./FILE.py:FUNCTION, or a list of these"
    given = data.get("metric")
    listed = isinstance(given, list) and given and all(isinstance(name, str) for name in given)
    if not (given is None or isinstance(given, str) or listed):
        yield Fault(("metric",), "not a metric's name", given, True, allowed)
        return
    names = [metric_name(name) for name in _metrics(data)]
    if len(set(names)) < len(names):
        yield Fault(("metric",), "two of one name", given, True, "each name once")
    if taken := LOWER_IS_BETTER.intersection(names):
        yield Fault(("metric",), f"{min(taken)} is the model's own", given, True, "another name")
    for name in _metrics(data):
        if not is_code(name) and name not in known:
            message = did_you_mean("unknown metric", name, known)
            yield Fault(("metric",), message, name, True, allowed)
        elif is_code(name):
            try:
                metric_digest(name)
            except DataError as error:
                yield Fault(("metric",), str(error), name, True)
