"""Which rows an evaluation is about. No tensor library is loaded here.

Predictions as a file: one JSON object a line, in the split's order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorakit.data.cache import CACHED_ROWS, EncodedCache, encoding_key
from lorakit.data.paths import no_split
from lorakit.data.sources import Split
from lorakit.errors import DataError, shown
from lorakit.tasks.base import GenerationSection, Prediction, Task
from lorakit.tasks.checks import absent_notes, unused_notes
from lorakit.tasks.classification import label_order

#: Labels of the data -> the class names of the base's own head, None where it lacks one of them.
ByHead = Callable[[Sequence[str]], list[str] | None]


def load_eval_split(
    task: Task, config: Any, name: str | None, limit: int | None, skip_bad: bool = False
) -> Split:
    """The split ``name`` (None: the task's own choice), or its first ``limit`` rows; ``limit``
    goes before the recipe's. Raises DataError if the source has no such split, and for a bad row,
    but for ``skip_bad`` where the recipe skips those: scores are of all rows."""
    name = name or task.eval_split(config)
    if limit is not None:
        config = config.model_copy(update={"limit_train": limit, "limit_eval": limit})
    if not skip_bad:
        config = config.model_copy(update={"on_bad_row": "error"})
    found = task.load(config, name)
    if found is None:
        if config.path is None:
            source = "/".join(part for part in task.hub_source(config) or () if part)
            raise DataError(f"{source}: no split {name!r}")
        raise no_split(config.path, name)
    return found


def with_labels(
    task: Task,
    config: Any,
    trained: Sequence[str] | None,
    split: Split,
    by_head: ByHead,
    say: Callable[[str], None],
) -> Any:
    """``config`` with the class names that it leaves to the data: those that the adapter was
    ``trained`` with, else those that ``resolve_labels`` finds for ``split``."""
    if _has_labels(config):
        return config
    if trained:
        return config.model_copy(update={"labels": list(trained)})
    train = task.load(config, "train")
    other = task.load(config, task.eval_split(config)) if split.name == "train" else train
    splits = [found for found in (split, other) if found is not None]
    return resolve_labels(task, config, train, splits, by_head, say)


def resolve_labels(
    task: Task,
    config: Any,
    train: Split | None,
    splits: Sequence[Split],
    by_head: ByHead,
    say: Callable[[str], None],
) -> Any:
    """``task.resolve``; where the train split does not give the labels of all ``splits``, the names
    of the base's own head if they cover them, which is said. ``by_head`` gives these for the
    labels of the data. Raises DataError as ``resolve`` does."""
    if _has_labels(config):
        return task.resolve(config, train)
    resolved, problem = None, None
    try:
        resolved = task.resolve(config, train)
        if all(task.reads_labels(resolved, split) for split in splits):
            return resolved
    except DataError as error:
        problem = error
    found = task.label_names(config, splits)
    names = by_head(found) if found else None
    if found and names:
        if set(found) <= set(names):  # names, which stand in the order of the train split's
            names.sort(key=label_order)
        say(f"task.labels: taken from the base's classification head: {', '.join(names)}")
        return config.model_copy(update={"labels": names})
    if problem is not None:
        raise problem
    return resolved


def _has_labels(config: Any) -> bool:
    """Whether nothing is left to the data."""
    return getattr(config, "labels", ()) is not None or getattr(config, "regression", False)


def settle(task: Task, config: Any, split: Split, say: Callable[[str], None]) -> tuple[Task, Any]:
    """The task that reads ``split``, and its config; says which files and columns the split has
    where that was not plain, what was chosen and recognised, and what of the rows is not used."""
    chosen, own = task.chosen(config, split)
    for note in split.notes:
        say(note)
    for note in chosen.notes(own, split):
        say(note if chosen is task else f"{note}: task {own.name}")
    for note in absent_notes(chosen, own, split):
        say(note)
    for note in unused_notes(chosen, own, split):
        say(note)
    return chosen, own


def encoding_cache(
    task: Task, config: Any, tokenizer: Any, rows: int, say: Callable[[str], None], write: bool
) -> EncodedCache | None:
    """Where the tokens of this task's rows may be: None for few, and, said, for a tokenizer that
    has none.

    What only places the data or scores a generation changes no token, and stands in no key.
    """
    if rows < CACHED_ROWS:
        return None
    unread = {*GenerationSection.model_fields} - {"name", "max_length", "on_bad_row"}
    values = config.model_dump(mode="json", exclude=unread)
    values["task"] = f"{type(task).__module__}.{type(task).__qualname__}"
    key = encoding_key(tokenizer, values, task.digest)
    if key is None:
        say("the tokenizer is a slow one: its tokens are not kept for the next run")
        return None
    return EncodedCache(key, say, write)


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
