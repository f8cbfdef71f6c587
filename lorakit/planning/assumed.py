"""Data that cannot be read: a plan then assumes rows as long as they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit import registry
from lorakit.data.counts import Counts
from lorakit.data.encode import EncodedRow, EncodedSplit
from lorakit.data.sources import Split
from lorakit.models.load import Pretrained
from lorakit.models.window import fit_max_length
from lorakit.notes import Say
from lorakit.pipeline.encoding import TrainingData
from lorakit.recipe.sections import Recipe
from lorakit.tasks.base import Task
from lorakit.training.setup import Inputs


@dataclass(frozen=True)
class PaddingTokenizer:
    """Stands for a tokenizer that is not there, to collate rows."""

    pad_token_id: int = 0


def full_row(task: Task, config: Any) -> EncodedRow:
    """A row of ``max_length`` tokens, all of which are trained, or which has a label."""
    length = config.max_length
    label: Any = None
    words = None
    if task.kind == "encoder":
        labels, problem = task.labels(config, None), task.problem(config)
        label = 0.0 if labels is None else 0
        if problem == "multi_label_classification":
            label = np.zeros(len(labels or ()), np.float32)
        elif problem == "token_classification":
            label, words = np.zeros(length, np.int64), np.arange(length, dtype=np.int32)
    mask = np.ones(length, np.bool_)
    return EncodedRow(np.zeros(length, np.int32), mask, label=label, words=words)


def assumed_inputs(recipe: Recipe, loaded: Pretrained, say: Say) -> Inputs:
    """The inputs of a run of one step of full rows."""
    task: Task = registry.task(recipe.task.name)
    config = fit_max_length(loaded.model, recipe.task, say)
    train = recipe.train
    size = train.per_device_batch_size
    tokens = train.max_tokens_per_batch or 0
    rows = size if isinstance(size, int) else max(1, tokens // config.max_length)
    row = full_row(task, config)
    count = rows * train.gradient_accumulation_steps
    encoded = EncodedSplit(
        input_ids=np.zeros(count * config.max_length, np.int32),
        loss_mask=np.tile(row.loss_mask, count),
        offsets=np.arange(count + 1, dtype=np.int64) * config.max_length,
        token_type_ids=None,
        labels=None if row.label is None else (row.label,) * count,
        counts=Counts(rows=count, tokens=count * config.max_length),
        words=None if row.words is None else np.tile(row.words, count),
    )
    split = Split("train", [{}] * count, "assumed rows", "")
    return Inputs(task, loaded, TrainingData(config, encoded, None), split, [])
