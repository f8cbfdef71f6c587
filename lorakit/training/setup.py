"""Load data and model, inject the adapter, and report what does not fit.

No file is written before that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit import registry
from lorakit.adapters.start import check_tokens, load_values, read_start
from lorakit.anatomy import outermost
from lorakit.data.encode import EncodedSplit
from lorakit.data.mixture import mixture_table
from lorakit.data.sources import Split
from lorakit.errors import UserError, shown
from lorakit.evaluation.evaluate import EvalData
from lorakit.injection import InjectionReport, find_heads, inject
from lorakit.methods.base import Method
from lorakit.models.causal import check_packable
from lorakit.models.load import Pretrained, load_pretrained
from lorakit.models.window import fit_max_length
from lorakit.notes import Say
from lorakit.pipeline.encoding import StreamedRows, TrainingData, encode_training_data
from lorakit.pipeline.system_prompts import system_prompts
from lorakit.pipeline.task_data import TaskData, load_training_data
from lorakit.recipe.sections import Recipe
from lorakit.tasks.base import Task
from lorakit.training.tokens import train_tokens


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs. ``recipe`` includes the values that data and model determine,
    such as labels; ``method`` remains the same if the user's file changes during the run; ``data``
    describes the splits for ``run.json``, and ``init_from`` the adapter that the run starts from,
    None also if it resumes; ``system_prompts`` are those of the training chats, ``class_weights``
    those of a classifier's classes."""

    recipe: Recipe
    task: Task
    method: Method
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    report: InjectionReport
    train: EncodedSplit | StreamedRows
    evaluation: EvalData | None
    data: dict[str, Any]
    system_prompts: list[str]
    init_from: dict[str, str] | None = None
    class_weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Inputs:
    """The base model, and the data, tokenized for it: what adapters of one base can share."""

    task: Task
    loaded: Pretrained
    encoded: TrainingData
    split: Split
    system_prompts: list[str]


def prepare(recipe: Recipe, say: Say, write_cache: bool = True, resumes: bool = False) -> Prepared:
    """Load, tokenize and inject; raises UserError if recipe, data and model do not fit together."""
    return adapt(recipe, load_inputs(recipe, say, write_cache), say, resumes)


def load_inputs(recipe: Recipe, say: Say, write_cache: bool = True) -> Inputs:
    """Load the base model and the data; raises UserError if they do not fit together."""
    data = load_training_data(recipe, say)
    loaded = load_task_model(recipe, data)
    for note in loaded.notes:
        say(note)
    return encode_inputs(recipe, data, loaded, say, write_cache)


def load_task_model(recipe: Recipe, data: TaskData) -> Pretrained:
    """Load the base with a head for the task, if it needs one; raises ModelError if they do not
    fit together."""
    seed, labels = recipe.train.seed, data.labels
    return load_pretrained(recipe.model, data.task.kind, labels, seed, problem=data.problem)


def encode_inputs(
    recipe: Recipe, data: TaskData, loaded: Pretrained, say: Say, write_cache: bool = True
) -> Inputs:
    """Tokenize the data; raises UserError if recipe, data and model do not fit together."""
    model = loaded.model
    data = replace(data, config=fit_max_length(model, data.config, say))
    if data.config.packing:
        check_packable(model)
    checkpointing = recipe.train.gradient_checkpointing is True
    if checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"train.gradient_checkpointing = true: {type(model).__name__} does not support it; "
            "allowed: false"
        )
    encoded = encode_training_data(data, model, loaded.tokenizer, say, write_cache=write_cache)
    prompts = system_prompts(data.task, encoded.config, data.split)
    return Inputs(data.task, loaded, encoded, data.split, prompts)


def adapt(recipe: Recipe, inputs: Inputs, say: Say, resumes: bool = False) -> Prepared:
    """Inject the adapter into the model of ``inputs``, with the values of ``adapter.init_from``
    unless the run ``resumes``; raises UserError if it does not fit."""
    loaded, encoded = inputs.loaded, inputs.encoded
    model = loaded.model
    check_best_metric(recipe, encoded.evaluation)
    recipe = recipe.model_copy(update={"task": encoded.config})

    torch.manual_seed(recipe.train.seed)
    heads = dict.fromkeys([*find_heads(model), *loaded.new_modules])
    method: Method = registry.method(recipe.adapter.method)
    adapter, start = recipe.adapter, None
    if adapter.init_from is not None and not resumes:
        start = read_start(model, recipe.model, adapter, heads, say)
        adapter = start.config
        recipe = recipe.model_copy(update={"adapter": adapter})
    alone = adapter.model_copy(update={"init_from": None})
    report = inject(model, alone, outermost(heads))
    if loaded.trained_tokens:
        report = train_tokens(model, loaded.trained_tokens, adapter, report)
    if start is not None and model.device.type != "meta":
        load_values(model, start, report.modules_to_save)
        check_tokens(start, loaded.tokenizer)
    for line in str(report).splitlines():
        say(line)
    described = {inputs.split.name: _describe_split(inputs.split, encoded.train)}
    if (evaluation := encoded.evaluation) is not None:
        described[evaluation.split.name] = _describe_split(evaluation.split, evaluation.encoded)
    return Prepared(
        recipe=recipe,
        task=inputs.task,
        method=method,
        model=model,
        tokenizer=loaded.tokenizer,
        report=report,
        train=encoded.train,
        evaluation=evaluation,
        data=described,
        system_prompts=inputs.system_prompts,
        init_from=None if start is None else start.described(),
        class_weights=encoded.class_weights,
    )


def _describe_split(split: Split, encoded: EncodedSplit | StreamedRows) -> dict[str, Any]:
    """Describe a split for ``run.json``; a stream's rows and tokens are not known in advance."""
    known: dict[str, Any] = {"rows": None, "tokens": None}
    if isinstance(encoded, EncodedSplit):
        skipped = encoded.counts.skipped_rows
        known = {"rows": len(split), "tokens": int(encoded.offsets[-1]), "skipped_rows": skipped}
        if encoded.sources:
            known["sources"] = mixture_table(encoded.sources)
    return {"source": split.source, "fingerprint": split.identity} | known


def main_metric(recipe: Recipe, task: Task) -> str:
    """Return the metric that selects the best model: the recipe's, or else the task's main metric
    among those that evaluations during training compute."""
    return recipe.train.metric_for_best_model or task.best_metric(recipe.task)


def check_best_metric(recipe: Recipe, evaluation: EvalData | None) -> None:
    """Raise UserError if evaluations during training will not measure what the recipe needs."""
    train = recipe.train
    if evaluation is None:
        for key in ("metric_for_best_model", "early_stopping_patience", "eval_every_steps"):
            if getattr(train, key) is not None:
                raise UserError(
                    f"train.{key} = {shown(getattr(train, key))}: the task has no validation "
                    "split; allowed: null"
                )
        return
    task, config = evaluation.task, evaluation.config
    name, generates = train.metric_for_best_model, task.generates(config, final=False)
    known = evaluation.measured_metrics(generates) if name else set()
    if name and name not in known:
        hint = "; with task.eval_generate: always, also the scores of generated text"
        only_at_end = task.generates(config) and not generates
        raise UserError(
            f"train.metric_for_best_model = {shown(name)}: evaluations during training do not "
            f"measure it; allowed: null, {', '.join(sorted(known))}{hint if only_at_end else ''}"
        )
