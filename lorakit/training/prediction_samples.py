"""``predictions.json``: what the final evaluation predicted, counted by class and as examples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.data.chat.turns import content_text
from lorakit.data.examples import ChatExample, ClassificationExample, Example, TextExample
from lorakit.errors import DataError
from lorakit.evaluation.evaluate import EvalData
from lorakit.evaluation.label_predictions import as_prediction
from lorakit.io.atomic import write_text, writing
from lorakit.tasks.base import Prediction
from lorakit.training.run_json import read_json

PREDICTIONS_JSON = "predictions.json"
#: As many examples of right and of wrong predictions, chosen from the first rows of the split.
_EXAMPLES, _ROWS = 20, 2_000
_CHARACTERS = 1_200
#: Counts of more classes would be larger than all else in the file.
_MOST_CLASSES = 100


@dataclass(frozen=True)
class _Compared:
    """A row of the split. ``right``: whether the prediction equals the reference; None for a number
    that is not exactly it, of which ``error`` is the distance."""

    row: int
    reference: str
    prediction: str
    right: bool | None
    error: float = 0.0


def write_predictions(
    folder: Path, data: EvalData, predictions: Sequence[Prediction], step: int
) -> None:
    """Write ``predictions.json``: the split, the ``step`` of the weights, the number of rows, a
    classifier's ``labels`` and ``confusion`` (a row per label, a column per predicted class), and
    ``examples`` of right and of wrong predictions (of a regression, the worst).

    Without predictions, a file of another step is deleted. Raises WriteFailed.
    """
    file = folder / PREDICTIONS_JSON
    with writing(file):
        if predictions:
            found = _described(data, predictions) | {"step": step}
            write_text(file, json.dumps(found, ensure_ascii=False, indent=1) + "\n")
        elif file.is_file() and read_json(file).get("step") != step:
            file.unlink()


def _described(data: EvalData, predictions: Sequence[Prediction]) -> dict[str, Any]:
    names = data.task.labels(data.config, None) if data.task.kind == "encoder" else None
    found: dict[str, Any] = {"split": data.split.name, "rows": len(data.split)}
    if names is not None and len(names) <= _MOST_CLASSES:
        counts = _confusion(data, predictions, len(names))
        found |= {} if counts is None else {"labels": names, "confusion": counts}
    compared = list(_compare(data, predictions[:_ROWS], names))
    return found | {"examples": [_example(data, own) for own in _chosen(compared)]}


def _confusion(
    data: EvalData, predictions: Sequence[Prediction], classes: int
) -> list[list[int]] | None:
    """The number of rows, or words, of each label with each predicted class. None if a row has
    several labels."""
    problem, labels = data.task.problem(data.config), data.encoded.labels or ()
    if problem not in ("single_label_classification", "token_classification"):
        return None
    counts = np.zeros((classes, classes), dtype=np.int64)
    for label, prediction in zip(labels, predictions, strict=True):
        pairs = zip(np.atleast_1d(label).tolist(), _listed(prediction), strict=True)
        for right, predicted in pairs:
            if isinstance(predicted, int) and right >= 0:
                counts[int(right), predicted] += 1
    return counts.tolist()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _compare(
    data: EvalData, predictions: Sequence[Prediction], names: Sequence[str] | None
) -> Iterator[_Compared]:
    if data.encoded.labels is None:
        for row, prediction in enumerate(predictions):
            _, reference = _texts(data, row)
            own = str(prediction)
            yield _Compared(row, reference, own, own.strip() == reference.strip())
        return
    problem = data.task.problem(data.config)
    for row, prediction in enumerate(predictions):
        label = as_prediction(data.encoded.labels[row], problem)
        shown = [_shown(value, names) for value in (label, prediction)]
        if names is None and isinstance(label, float) and isinstance(prediction, float):
            error = abs(label - prediction)
            yield _Compared(row, shown[0], shown[1], True if error == 0 else None, error)
        else:
            yield _Compared(row, shown[0], shown[1], label == prediction)


def _shown(value: Any, names: Sequence[str] | None) -> str:
    """A class, a number, or several classes, as text."""
    if isinstance(value, list):
        return ", ".join(_shown(item, names) for item in value) or "(none)"
    if isinstance(value, dict):
        return str(value.get("error", value))
    if value is None:
        return "(none)"
    if names is not None and 0 <= value < len(names):
        return names[int(value)]
    return f"{value:.6g}"


def _chosen(compared: Sequence[_Compared]) -> list[_Compared]:
    """Examples of wrong predictions, then of right ones; of numbers, the worst."""
    numbers = sorted((own for own in compared if own.right is None), key=lambda own: -own.error)
    wrong = [own for own in compared if own.right is False]
    right = [own for own in compared if own.right]
    return [*numbers[:_EXAMPLES], *_spread(wrong), *_spread(right)]


def _spread(rows: Sequence[_Compared]) -> Iterable[_Compared]:
    """At most ``_EXAMPLES``, at equal distances."""
    count = min(len(rows), _EXAMPLES)
    return [rows[at * len(rows) // count] for at in range(count)]


def _example(data: EvalData, own: _Compared) -> dict[str, Any]:
    return {
        "row": own.row + 1,
        "input": _shortened(_texts(data, own.row)[0]),
        "reference": _shortened(own.reference),
        "prediction": _shortened(own.prediction),
        "right": own.right,
    }


def _texts(data: EvalData, row: int) -> tuple[str, str]:
    """What the model reads of a row, and the text that it is to write; empty for an encoder."""
    task, config, values = data.task, data.config, data.split.rows[row]
    example = task.example(values, config)
    if isinstance(example, ClassificationExample):
        return "\n".join(text for text in (example.text, example.text_pair) if text), ""
    prompt = task.prompt(values, config)
    if isinstance(example, ChatExample) and isinstance(prompt, ChatExample):
        answer = example.messages[len(prompt.messages) :][:1]
        return _chat_text(prompt), "\n".join(map(_message_text, answer))
    return _segments(prompt), _segments(example, trained=True)


def _chat_text(chat: ChatExample) -> str:
    return "\n".join(f"{each['role']}: {_message_text(each)}" for each in chat.messages)


def _message_text(message: Mapping[str, Any]) -> str:
    """The content; of a message without one, all else that it has, such as tool calls."""
    others = {key: value for key, value in message.items() if key not in ("role", "content")}
    return content_text(message) or (json.dumps(others, default=str) if others else "")


def _segments(example: Example, trained: bool = False) -> str:
    if not isinstance(example, TextExample):
        raise DataError("the task's prompt is of another form than its example")
    return "".join(each.text for each in example.segments if each.trained or not trained)


def _shortened(text: str) -> str:
    """``text`` without its middle if it is long."""
    half = _CHARACTERS // 2
    return text if len(text) <= _CHARACTERS else f"{text[:half]} [...] {text[-half:]}"
