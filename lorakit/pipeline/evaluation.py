"""Evaluate a recipe's task on an adapter or on the base model: ``lorakit eval``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lorakit import registry
from lorakit.distributed.processes import init_process_group, is_main
from lorakit.errors import UserError
from lorakit.evaluation.evaluate import evaluate_model
from lorakit.evaluation.progress import OnPhase
from lorakit.models.load import fit_max_length
from lorakit.openmp import yield_cores
from lorakit.pipeline.adapted_model import (
    check_labels,
    load_adapted,
    read_task_adapter,
    trained_labels,
)
from lorakit.pipeline.encoding import encode_eval_data
from lorakit.pipeline.predictions import SplitEvaluation
from lorakit.pipeline.task_data import load_task_data
from lorakit.recipe.sections import Recipe
from lorakit.tasks.base import Task

Say = Callable[[str], None]


def evaluate(
    recipe: Recipe,
    adapter: str | Path | None = None,
    *,
    base: bool = False,
    split: str | None = None,
    limit: int | None = None,
    on_progress: OnPhase | None = None,
) -> dict[str, float]:
    """Return the metrics of ``recipe``'s task for an adapter, or with ``base`` for the base model.

    ``adapter`` is a directory in PEFT's format and defaults to the one that training the recipe
    writes. ``split`` and ``limit`` (the first N rows) override the task and the recipe.
    ``on_progress`` receives the phase ("loss", "generated" or "evaluated"), the rows done and the
    total. Under ``torchrun`` or ``accelerate launch`` the processes share the rows, and each
    returns the same metrics. Notes go to stderr.

    Raises UserError for anything that is missing or does not fit, and EvaluationError for a metric
    that is not finite.
    """
    return evaluate_split(
        recipe, adapter, base=base, split=split, limit=limit, on_progress=on_progress
    ).metrics


@yield_cores()
def evaluate_split(
    recipe: Recipe,
    adapter: str | Path | None = None,
    *,
    base: bool = False,
    split: str | None = None,
    limit: int | None = None,
    on_progress: OnPhase | None = None,
    say: Say = lambda text: print(text, file=sys.stderr),
) -> SplitEvaluation:
    """Evaluate like ``evaluate``, and return the predictions too. Notes go to ``say``."""
    if base and adapter is not None:
        raise UserError(f"evaluate: base=True and adapter={str(adapter)!r}; allowed: one of them")
    init_process_group()
    task: Task = registry.task(recipe.task.name)
    task.check_requirements(recipe.task)
    files = None if base else read_task_adapter(recipe, adapter, task, say)
    data = load_task_data(recipe, split, limit=limit, trained_labels=trained_labels(files), say=say)
    if files is not None:
        check_labels(files, data.labels)
    seed = recipe.train.seed
    model, tokenizer = load_adapted(recipe.model, data.task.kind, data.labels, files, seed, say)
    data = replace(data, config=fit_max_length(model, data.config, say))
    result = evaluate_model(
        model,
        tokenizer,
        encode_eval_data(data, model, tokenizer, say, write_cache=is_main()),
        batch_size=recipe.eval_batch_size,
        seed=seed,
        on_progress=on_progress,
    )
    return SplitEvaluation(
        task=data.config.name,
        split=data.split.name,
        examples=len(data.split),
        metrics=result.metrics,
        predictions=result.predictions,
    )
