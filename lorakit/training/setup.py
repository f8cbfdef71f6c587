"""Recipe -> data, model and adapter, ready to train. Everything that can be wrong shows here,
before a file is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit import registry
from lorakit.data.cache import CACHED_ROWS, EncodedCache, encoding_key
from lorakit.data.encode import EncodedSplit, check_token_ids, encode_split, truncation_note
from lorakit.data.sources import Split
from lorakit.errors import DataError, UserError
from lorakit.evaluation.prompts import encode_prompts
from lorakit.evaluation.splits import settle
from lorakit.injection import InjectionReport, find_heads, inject
from lorakit.models.load import load_pretrained
from lorakit.models.packed import check_packable
from lorakit.models.window import check_length, window
from lorakit.recipe.sections import Recipe
from lorakit.tasks.base import GenerationSection, Task

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
    train: EncodedSplit
    evaluation: EvalData | None
    data: dict[str, Any]


def prepare(recipe: Recipe, say: Say, write_cache: bool = True) -> Prepared:
    """Load, tokenise and inject. Raises the UserError of whatever does not fit."""
    task: Task = registry.task(recipe.task.name)
    config = recipe.task
    task.check_requirements(config)
    train = task.load(config, "train")
    if train is None:
        raise DataError(f"task.path: no training split in {config.path}")
    task, config = settle(task, config, train, say)
    validation = task.load(config, task.eval_split(config))
    if validation is not None:
        settle(task, config, validation, say)
    config = task.resolve(config, train)
    recipe = recipe.model_copy(update={"task": config})
    labels = task.labels(config, train)

    loaded = load_pretrained(recipe.model, task.kind, labels, seed=recipe.train.seed)
    for note in loaded.notes:
        say(note)
    model, tokenizer = loaded.model, loaded.tokenizer
    check_length(model, config.max_length)
    if config.packing:
        check_packable(model)
    many = max(len(split) for split in (train, validation) if split is not None) >= CACHED_ROWS
    cache = encoding_cache(task, config, tokenizer, say, write_cache) if many else None
    encoded = {
        split.name: encode_split(split, lambda r: task.example(r, config), tokenizer,
                                 config.max_length, cache=cache)
        for split in (train, validation) if split is not None
    }  # fmt: skip
    embedding = model.get_input_embeddings()
    for name, rows in encoded.items():
        if isinstance(embedding, nn.Embedding):
            check_token_ids(rows, tokenizer, embedding.num_embeddings)
        if cut := truncation_note(rows, name, config.max_length):
            say(cut)
    evaluation = EvalData(validation, encoded[validation.name]) if validation is not None else None
    check_best_metric(recipe, task, evaluation)
    if validation is not None and task.generates(config):
        # What the final evaluation would refuse is refused before the training.
        encode_prompts(task, config, validation, tokenizer, window(model))

    torch.manual_seed(recipe.train.seed)
    heads = dict.fromkeys([*find_heads(model), *loaded.new_modules])
    report = inject(model, recipe.adapter, _outermost(list(heads)))
    say(str(report))
    data = {
        split.name: {
            "source": split.source,
            "rows": len(split),
            "fingerprint": split.fingerprint,
            "tokens": int(encoded[split.name].offsets[-1]),
        }
        for split in (train, validation)
        if split is not None
    }
    return Prepared(recipe, task, model, tokenizer, report, encoded[train.name], evaluation, data)


def encoding_cache(
    task: Task, config: Any, tokenizer: PreTrainedTokenizerBase, say: Say, write: bool
) -> EncodedCache | None:
    """Where the tokens of this task's rows may be; None, and said, for a tokenizer that has none.

    What only places the data or scores a generation changes no token, and stands in no key.
    """
    unread = {*GenerationSection.model_fields} - {"name", "max_length"}
    values = config.model_dump(mode="json", exclude=unread)
    values["task"] = f"{type(task).__module__}.{type(task).__qualname__}"
    key = encoding_key(tokenizer, values, task.source_digest())
    if key is None:
        say("the tokenizer is a slow one: its tokens are not kept for the next run")
        return None
    return EncodedCache(key, say, write)


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
