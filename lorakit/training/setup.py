"""Recipe -> data, model and adapter, ready to train. Everything that can be wrong shows here,
before a file is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.data.encode import EncodedSplit
from lorakit.data.sources import Split
from lorakit.errors import UserError
from lorakit.evaluation.prompts import check_all_prompts
from lorakit.injection import InjectionReport, find_heads, inject
from lorakit.models.causal import check_packable
from lorakit.models.load import fit_max_length, load_pretrained, window
from lorakit.recipe.sections import Recipe
from lorakit.tasks.base import Task
from lorakit.tasks.checks import counts_line, label_counts, look_alikes
from lorakit.training.rows import Streamed, encode_rows, load_rows

Say = Callable[[str], None]


@dataclass(frozen=True)
class EvalData:
    split: Split
    encoded: EncodedSplit


@dataclass(frozen=True)
class Prepared:
    """``recipe`` is the given one with what the data decided (class names) written in."""

    recipe: Recipe
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    report: InjectionReport
    train: EncodedSplit | Streamed
    evaluation: EvalData | None
    data: dict[str, Any]


def prepare(recipe: Recipe, say: Say, write_cache: bool = True) -> Prepared:
    """Load, tokenise and inject. Raises the UserError of whatever does not fit."""
    rows = load_rows(recipe, say)
    task, config, validation = rows.task, rows.config, rows.validation

    loaded = load_pretrained(recipe.model, task.kind, rows.labels, seed=recipe.train.seed)
    for note in loaded.notes:
        say(note)
    model, tokenizer = loaded.model, loaded.tokenizer
    config = fit_max_length(model, config, say)
    rows, recipe = replace(rows, config=config), recipe.model_copy(update={"task": config})
    if config.packing:
        check_packable(model)
    if recipe.train.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"train.gradient_checkpointing = true: {type(model).__name__} does not support it; "
            "allowed: false"
        )
    train, encoded = encode_rows(rows, model, tokenizer, say, write_cache)
    for line in _label_lines(task, config, train):
        say(line)
    evaluation = EvalData(validation, encoded) if validation is not None and encoded else None
    check_best_metric(recipe, task, evaluation)
    if validation is not None and task.generates(config):
        # What the final evaluation would refuse is refused before the training.
        config = check_all_prompts(task, config, validation, tokenizer, window(model), say)
        recipe = recipe.model_copy(update={"task": config})

    torch.manual_seed(recipe.train.seed)
    heads = dict.fromkeys([*find_heads(model), *loaded.new_modules])
    report = inject(model, recipe.adapter, _outermost(list(heads)))
    for line in str(report).splitlines():
        say(line)
    data = {rows.train.name: _described(rows.train, train)}
    if evaluation is not None:
        data[evaluation.split.name] = _described(evaluation.split, evaluation.encoded)
    return Prepared(recipe, task, model, tokenizer, report, train, evaluation, data)


def _label_lines(task: Task, config: Any, train: EncodedSplit | Streamed) -> list[str]:
    """How often the training data has each label; nothing for a stream, whose rows are unread."""
    labels = task.labels(config, None)
    if labels is None or not isinstance(train, EncodedSplit) or train.labels is None:
        return []
    counts = label_counts(labels, train.labels)
    return [f"labels: {counts_line(counts)}", *look_alikes(counts)]


def _described(split: Split, encoded: EncodedSplit | Streamed) -> dict[str, Any]:
    """For ``run.json``; of a stream nobody knows how many rows and tokens it has."""
    known: dict[str, Any] = {"rows": None, "tokens": None}
    if isinstance(encoded, EncodedSplit):
        skipped = encoded.counts.skipped_rows
        known = {"rows": len(split), "tokens": int(encoded.offsets[-1]), "skipped_rows": skipped}
    return {"source": split.source, "fingerprint": split.fingerprint} | known


def main_metric(recipe: Recipe, task: Task) -> str:
    """The metric that chooses the best model: as asked, else the task's main one among those that
    evaluations during training compute."""
    return recipe.train.metric_for_best_model or task.best_metric(recipe.task)


def check_best_metric(recipe: Recipe, task: Task, evaluation: EvalData | None) -> None:
    """Raise UserError if evaluations during training will not compute what the recipe needs."""
    train = recipe.train
    if evaluation is None:
        for key in ("metric_for_best_model", "early_stopping_patience", "eval_every_steps"):
            if getattr(train, key) is not None:
                raise UserError(
                    f"train.{key} = {getattr(train, key)!r}: the task has no validation split; "
                    "allowed: null"
                )
        return
    name = train.metric_for_best_model
    known = _measured(task, recipe.task, evaluation) if name else set()
    if name and name not in known:
        hint = "; with task.eval_generate: always also the scores of generated text"
        only_at_end = task.generates(recipe.task) and not task.generates(recipe.task, final=False)
        raise UserError(
            f"train.metric_for_best_model = {name!r}: evaluations during training do not measure "
            f"it; allowed: null, {', '.join(sorted(known))}{hint if only_at_end else ''}"
        )


def _measured(task: Task, config: Any, evaluation: EvalData) -> set[str]:
    """The names of the metrics that evaluations during training give."""
    if task.kind == "encoder":
        labels = evaluation.encoded.labels
        assert labels is not None
        return {"loss", *task.metrics(list(labels), evaluation.split, config)}
    names = {"loss", "perplexity"}
    if task.generates(config, final=False):
        names |= set(task.metrics([""] * len(evaluation.split), evaluation.split, config))
    return names


def _outermost(names: list[str]) -> list[str]:
    return [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
