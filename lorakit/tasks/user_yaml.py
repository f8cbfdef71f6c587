"""Tasks defined by a user's YAML file: a ``kind``, defaults for its keys, and metrics.

The keys are those of the built-in task of that kind; a recipe that names the file may override
any of them. A metric is built in or a user's function, ``./my_metric.py:function``.
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
from lorakit.errors import DataError, RecipeError, UserError, did_you_mean, shown
from lorakit.metrics.coco_caption import cider, rouge_l
from lorakit.metrics.mteval import bleu, nist
from lorakit.metrics.multi_label import MULTI_LABEL_METRICS
from lorakit.recipe.diagnostics import Fault, explain
from lorakit.recipe.sections import TaskSection
from lorakit.recipe.yaml_source import YamlFile, read_yaml
from lorakit.tasks.base import LOWER_IS_BETTER, Prediction, Task, exact_match, paired
from lorakit.tasks.classification import Classification
from lorakit.tasks.completion import Completion
from lorakit.tasks.labelling import Labelling, flagged_classes, for_metric, row_labels
from lorakit.user_code import guarded, is_code, load_attribute

#: Metrics of generated text that take several references per prediction.
_CORPUS_METRICS = {"bleu": bleu, "nist": nist, "rouge_l": rouge_l, "cider": cider}
_TEXT_METRICS = ("exact_match", *_CORPUS_METRICS)
_CLASS_METRICS = ("accuracy", "f1", "matthews_correlation")
_NUMBER_METRICS = ("pearson", "spearmanr")
#: The keys of a file that are not keys of the built-in task.
_FILE_KEYS = ("kind", "metric")


class UserCompletion(Completion):
    """``completion`` with the metrics ``scored_by``, the first of which is the main metric."""

    scored_by: ClassVar[tuple[str, ...]]

    def main_metric(self, config: Any) -> str:
        return metric_name(self.scored_by[0]) if self.generates(config) else "loss"

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """Raises DataError for a prediction that is not text."""
        pairs = paired(predictions, split, lambda row: self.completion(row, config))
        scores: dict[str, float] = {}
        for metric in self.scored_by:
            scores |= user_scores(metric, *pairs) if is_code(metric) else _scores(metric, *pairs)
        return scores


class UserClassification(Classification):
    """``classification`` with the metrics ``scored_by``. A user's function gets class indices, a
    list of them for each row with several labels, or numbers for a regression."""

    scored_by: ClassVar[tuple[str, ...]]

    def labelling(self, config: Any) -> Labelling:
        built_in = tuple(metric for metric in self.scored_by if not is_code(metric))
        return replace(super().labelling(config), metrics=built_in)

    def main_metric(self, config: Any) -> str:
        return metric_name(self.scored_by[0])

    def metric_names(self, config: Any) -> tuple[str, ...]:
        return tuple(map(metric_name, self.scored_by))

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """Raises DataError for a prediction that is not a label id."""
        scores = super().metrics(predictions, split, config)
        where = self.labelling(config)
        gold = row_labels(split, where)
        if where.several:
            gold = [flagged_classes(flags) for flags in gold]
        for metric in filter(is_code, self.scored_by):
            scores |= user_scores(metric, [for_metric(value) for value in predictions], gold)
        return scores


_KINDS: dict[str, type[UserCompletion] | type[UserClassification]] = {
    "completion": UserCompletion,
    "classification": UserClassification,
}


def load_yaml_task(file: Path) -> Task:
    """Load the task that a YAML file defines. Raises RecipeError with every problem of the file."""
    source = read_yaml(file)
    digest = hashlib.sha256(repr((source.data, source.problems)).encode()).digest()
    task = _task(file.resolve(), digest, str(file))
    for metric in filter(is_code, task.scored_by):
        digest += _metric_digest(metric)
    task.digest = hashlib.sha256(digest).digest()
    return task


@lru_cache(maxsize=32)
def _task(path: Path, digest: bytes, shown: str) -> UserCompletion | UserClassification:
    """Build the task and the class of its config, once per version of a file."""
    source = read_yaml(Path(shown))
    kind = _KINDS.get(str(source.data.get("kind")))
    faults = [*_faults(kind, source)]
    if source.problems or faults:
        located = [fault.locate(source) for fault in faults]
        raise RecipeError(sorted((*source.problems, *located), key=lambda p: p.line or 0))
    assert kind is not None, "otherwise it is a fault"
    defaults = {key: value for key, value in source.data.items() if key not in _FILE_KEYS}
    attributes = {
        "Config": _with_defaults(kind.Config, defaults),
        "scored_by": _metrics(source.data),
    }
    task: UserCompletion | UserClassification = type(kind.__name__, (kind,), attributes)()
    return task


def _with_defaults(section: type[TaskSection], defaults: Mapping[str, Any]) -> type[TaskSection]:
    class Config(section):  # type: ignore[valid-type, misc]
        @model_validator(mode="before")
        @classmethod
        def _fill(cls, data: Any) -> Any:
            return {**defaults, **data} if isinstance(data, dict) else data

    Config.__name__ = section.__name__
    return Config


def _faults(
    kind: type[UserCompletion] | type[UserClassification] | None, source: YamlFile
) -> Iterator[Fault]:
    if kind is None:
        yield _unknown_kind(source.data)
    else:
        yield from _key_faults(kind.Config, source.data)
        yield from _metric_faults(source.data)


def _unknown_kind(data: Mapping[str, Any]) -> Fault:
    kind, allowed = data.get("kind"), ", ".join(_KINDS)
    if "kind" not in data:
        return Fault(("kind",), "is required", allowed=allowed)
    return Fault(("kind",), did_you_mean("unknown kind", kind, _KINDS), kind, True, allowed)


def _key_faults(section: type[TaskSection], data: Mapping[str, Any]) -> Iterator[Fault]:
    known = [*_FILE_KEYS, *(key for key in section.model_fields if key != "name")]
    for key, value in data.items():
        if key not in known:
            message = did_you_mean("unknown key", key, known)
            yield Fault((key,), message, value, True, ", ".join(known))
    rest = {key: data[key] for key in data if key in known and key not in _FILE_KEYS}
    try:
        section.model_validate({**rest, "name": "user"})
    except ValidationError as error:
        yield from explain(section, rest, error)


def _metric_faults(data: Mapping[str, Any]) -> Iterator[Fault]:
    known: tuple[str, ...] = _TEXT_METRICS
    if data["kind"] == "classification":
        known = _label_metrics(data, _CLASS_METRICS)
    allowed = f"{', '.join(known)}, ./FILE.py:FUNCTION, or a list of these"
    given = data.get("metric")
    listed = isinstance(given, list) and given and all(isinstance(name, str) for name in given)
    if not (given is None or isinstance(given, str) or listed):
        yield Fault(("metric",), "not the name of a metric", given, True, allowed)
        return
    names = [metric_name(metric) for metric in _metrics(data)]
    if len(set(names)) < len(names):
        yield Fault(("metric",), "duplicate name", given, True, "each name once")
    if reserved := LOWER_IS_BETTER.intersection(names):
        yield Fault(("metric",), f"{min(reserved)} is reserved", given, True, "another name")
    for metric in _metrics(data):
        if is_code(metric):
            try:
                _metric_digest(metric)
            except UserError as error:
                yield Fault(("metric",), str(error), metric, True)
        elif metric not in known:
            message = did_you_mean("unknown metric", metric, known)
            yield Fault(("metric",), message, metric, True, allowed)


def _metrics(data: Mapping[str, Any]) -> tuple[str, ...]:
    given = data.get("metric")
    if given is None:
        if data["kind"] == "completion":
            return ("exact_match",)
        return _label_metrics(data, ("accuracy", "f1"))
    return (given,) if isinstance(given, str) else tuple(given)


def _label_metrics(data: Mapping[str, Any], one_class: tuple[str, ...]) -> tuple[str, ...]:
    """The metrics of a classification; ``one_class`` are those of one class per row."""
    if data.get("regression") is True:
        return _NUMBER_METRICS
    several = data.get("multi_label") is True or data.get("label_columns")
    return MULTI_LABEL_METRICS if several else one_class


def metric_name(metric: str) -> str:
    """The name of a metric's score: the function's name, or the built-in metric itself."""
    return metric.rpartition(":")[2] if is_code(metric) else metric


def _metric_digest(metric: str) -> bytes:
    """Hash the function's file. Raises UserError if the function cannot be loaded or called."""
    function, _, digest = load_attribute(metric)
    if not callable(function):
        raise DataError(f"{metric}: is of type {type(function).__name__}; allowed: a function")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise DataError(
            f"{metric}: cannot be called as function(predictions, references): {error}"
        ) from error
    except ValueError:  # a function written in C may have no signature
        pass
    return digest


def _scores(metric: str, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """A built-in metric of generated text, with one reference per prediction."""
    if metric == "exact_match":
        return {metric: exact_match(predictions, references)}
    score = _CORPUS_METRICS[metric]
    return {metric: score(predictions, [[text] for text in references])}


def user_scores(
    metric: str, predictions: Sequence[Any], references: Sequence[Any]
) -> dict[str, float]:
    """Call a user's ``function(predictions, references)``.

    It returns a number, or a dict of names to numbers whose first value is also reported under the
    function's name. Raises DataError if it fails or returns anything else.
    """
    function, file, _ = load_attribute(metric)
    with redirect_stdout(sys.stderr):
        result = guarded(function, file, DataError)(list(predictions), list(references))
    name = metric_name(metric)
    if isinstance(result, Mapping) and result:
        scores = checked_scores(result, metric)
        return {name: next(iter(scores.values())), **scores}
    return checked_scores({name: result}, metric)


def checked_scores(scores: Any, where: str) -> dict[str, float]:
    """Return ``scores`` as floats. Raises DataError for anything but a mapping of names to finite
    numbers, and for the reserved names ``loss`` and ``perplexity``."""
    if not isinstance(scores, Mapping):
        raise DataError(f"{where}: returned {shown(scores)}; allowed: a dict of names to numbers")
    for name, value in scores.items():
        if not (isinstance(name, str) and _is_finite(value)):
            raise DataError(f"{where}: {name} = {shown(value)}; allowed: a finite number")
        if name in LOWER_IS_BETTER:
            raise DataError(f"{where}: {name} is reserved; allowed: another name")
    return {name: float(value) for name, value in scores.items()}


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
