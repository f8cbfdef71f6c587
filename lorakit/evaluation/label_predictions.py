"""Predictions from an encoder's logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.data.encode import EncodedRow, EncodedSplit, Label
from lorakit.data.examples import Problem
from lorakit.models.heads import head_labels, label_columns
from lorakit.tasks.base import Prediction, Task


@dataclass(frozen=True)
class LabelPredictions:
    """``columns`` are the indices of the logits of the task's classes; None if they are all logits,
    in order. ``classes`` maps a logit's index to a prediction; empty if they are the same."""

    problem: Problem | None
    columns: Tensor | None
    classes: dict[Any, Prediction]

    @classmethod
    def of(cls, model: PreTrainedModel, task: Task, config: Any) -> LabelPredictions:
        """A class that the task does not have is predicted as ``{"error": ...}``, which names it;
        as the tag of a word, it is None."""
        problem, columns = task.problem(config), label_columns(model, task.labels(config, None))
        if columns is None:
            return cls(problem, None, {})
        classes: dict[Any, Prediction] = {
            at: None if problem == "token_classification" else {"error": f"the class {name}"}
            for at, name in enumerate(head_labels(model.config))
        }
        classes |= {at: index for index, at in enumerate(columns)}
        return cls(problem, torch.tensor(columns, device=model.device), classes)

    def choose(self, logits: Tensor) -> Tensor:
        """A number or the index of a logit for each row (or token); or whether a row has each of
        the task's classes, those with a probability of at least 0.5."""
        if self.problem == "multi_label_classification":
            own = logits if self.columns is None else logits[:, self.columns]
            return own.sigmoid() >= 0.5
        if logits.shape[-1] == 1:
            return logits.squeeze(-1)
        return logits.argmax(dim=-1)

    def read(
        self, chosen: NDArray[Any], encoded: EncodedSplit, rows: NDArray[np.int64]
    ) -> list[Prediction]:
        """The predictions for ``rows`` of a split, given what ``choose`` returned for them."""
        if self.problem == "multi_label_classification":
            return [np.flatnonzero(flags).tolist() for flags in chosen]
        if self.problem == "token_classification":
            own = zip(chosen, rows, strict=True)
            return [self._tags(tags, encoded[int(row)]) for tags, row in own]
        return [self.classes.get(value, value) for value in chosen.tolist()]

    def _tags(self, chosen: NDArray[np.int64], row: EncodedRow) -> list[int | None]:
        """The tag of each word; None for one without a token, which truncation has removed."""
        assert row.words is not None
        tags: list[int | None] = [None] * np.size(row.label)  # type: ignore[arg-type]
        for at in np.flatnonzero(row.words >= 0):
            index = int(chosen[at])
            tags[row.words[at]] = self.classes.get(index, index)
        return tags


def as_prediction(label: Label, problem: Problem | None) -> Prediction:
    """The prediction of exactly this label."""
    if not isinstance(label, np.ndarray):
        return label
    several = problem == "multi_label_classification"
    return (np.flatnonzero(label) if several else label).tolist()
