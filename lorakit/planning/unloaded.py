"""The data of a run, and its adapted model on the ``meta`` device: shapes without values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit import registry
from lorakit.data.examples import Problem
from lorakit.data.paths import data_files
from lorakit.errors import DataError, ModelError
from lorakit.methods.lora_layer import LoraLayer
from lorakit.models.heads import label_options
from lorakit.models.hub import hub_options, load_config, load_tokenizer
from lorakit.models.kinds import Kind, check_kind, task_type_of
from lorakit.models.load import Pretrained, empty_model
from lorakit.models.vocabulary import extend_vocabulary
from lorakit.notes import Say
from lorakit.pipeline.task_data import load_training_data
from lorakit.planning.assumed import PaddingTokenizer, assumed_inputs
from lorakit.recipe.sections import ModelSection, Recipe
from lorakit.tasks.base import Task
from lorakit.training.setup import Inputs, Prepared, adapt, encode_inputs

META = torch.device("meta")


@dataclass(frozen=True)
class Unloaded:
    """``inputs`` of a run without the weights of its model, which ``fresh`` makes again, for a
    recipe with other values. With ``is_assumed``, the rows are not those of the data."""

    inputs: Inputs
    fresh: Callable[[Recipe], Pretrained]
    is_assumed: bool = False


def load_unloaded(recipe: Recipe, say: Say) -> Unloaded:
    """Read and tokenize the data, and the configuration of the base model.

    Data of the Hub that cannot be read, and that of a model without a tokenizer, is assumed to have
    rows of the greatest length. Raises UserError if data and model do not fit together.
    """
    task: Task = registry.task(recipe.task.name)
    try:
        data = load_training_data(recipe, say)
    except DataError as error:
        if data_files(recipe.task.path):
            raise
        labels, problem = task.labels(recipe.task, None), task.problem(recipe.task)
        return _assumed(recipe, task.kind, labels, problem, f"{error}", say)

    def fresh(recipe: Recipe) -> Pretrained:
        return unloaded_model(recipe.model, data.task.kind, data.labels, data.problem)

    try:
        loaded = fresh(recipe)
    except NoTokenizer as error:
        kind, problem = data.task.kind, data.problem
        return _assumed(recipe, kind, data.labels, problem, f"{error}", say)
    return Unloaded(encode_inputs(recipe, data, loaded, say, write_cache=False), fresh)


def _assumed(
    recipe: Recipe,
    kind: Kind,
    labels: Sequence[str] | None,
    problem: Problem | None,
    reason: str,
    say: Say,
) -> Unloaded:
    def fresh(recipe: Recipe) -> Pretrained:
        return unloaded_model(recipe.model, kind, labels, problem, needs_tokenizer=False)

    inputs = assumed_inputs(recipe, fresh(recipe), say)
    length = inputs.encoded.config.max_length
    say(f"{reason}; assuming rows of {length:,} tokens, the most that task.max_length allows")
    return Unloaded(inputs, fresh, is_assumed=True)


class NoTokenizer(ModelError):
    """The model has no tokenizer here."""


def unloaded_model(
    section: ModelSection,
    kind: Kind,
    labels: Sequence[str] | None,
    problem: Problem | None,
    needs_tokenizer: bool = True,
) -> Pretrained:
    """``load_pretrained`` without values: the base on ``meta``, and its tokenizer. Raises
    NoTokenizer if it has none, unless that is not needed."""
    config = load_config(section)
    check_kind(config, kind, section.name_or_path)
    if kind == "encoder":
        for key, value in label_options(labels, problem).items():
            setattr(config, key, value)
    options: dict[str, Any] = {"dtype": getattr(torch, section.dtype)}
    if section.attn_implementation == "eager":
        options["attn_implementation"] = "eager"
    model = empty_model(config, task_type_of(kind, problem), section.trust_remote_code, **options)
    if not needs_tokenizer:
        placeholder: Any = PaddingTokenizer()
        return Pretrained(model, placeholder)
    try:
        tokenizer, notes = load_tokenizer(section.name_or_path, hub_options(section))
    except ModelError as error:
        name = section.name_or_path
        raise NoTokenizer(f"{name}: no tokenizer can be loaded to count tokens") from error
    with META:
        vocabulary = extend_vocabulary(model, tokenizer, section)
    model.config.pad_token_id = tokenizer.pad_token_id
    return Pretrained(model, tokenizer, (), (*notes, *vocabulary.notes), vocabulary.trained)


def adapt_unloaded(recipe: Recipe, inputs: Inputs, say: Say) -> Prepared:
    """Inject the adapter into the model of ``inputs``, without values. Raises UserError if it does
    not fit."""
    init = getattr(recipe.adapter, "init", "default")
    plain = recipe.model_copy(
        update={"adapter": recipe.adapter.model_copy(update={"init": "default"})}
        if init != "default"
        else {}
    )
    with META:
        prepared = adapt(plain, inputs, say)
    model: nn.Module = prepared.model
    model.to(META)
    if init == "pissa":  # keeps the initial factors, which need the weights' values
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.initial_A = torch.empty_like(layer.lora_A, requires_grad=False)
                layer.initial_B = torch.empty_like(layer.lora_B, requires_grad=False)
    return prepared
