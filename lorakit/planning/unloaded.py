"""The data of a run, and its adapted model on the ``meta`` device: shapes without values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakit.data.examples import Problem
from lorakit.methods.lora_layer import LoraLayer
from lorakit.models.heads import label_options
from lorakit.models.hub import explained, hub_options, load_config, load_tokenizer, quiet
from lorakit.models.kinds import Kind, check_kind, loader, task_type_of
from lorakit.models.load import Pretrained
from lorakit.models.vocabulary import extend_vocabulary
from lorakit.pipeline.task_data import Say, load_training_data
from lorakit.recipe.sections import ModelSection, Recipe
from lorakit.training.setup import Inputs, Prepared, adapt, encode_inputs

META = torch.device("meta")


def load_unloaded(recipe: Recipe, say: Say) -> tuple[Inputs, Callable[[Recipe], Pretrained]]:
    """Read the data, and tokenize it for the base model, of which only the configuration is read.
    Return also what makes the model again, for a recipe with other values. Raises UserError if they
    do not fit together."""
    data = load_training_data(recipe, say)

    def fresh(recipe: Recipe) -> Pretrained:
        return unloaded_model(recipe.model, data.task.kind, data.labels, data.problem)

    return encode_inputs(recipe, data, fresh(recipe), say, write_cache=False), fresh


def unloaded_model(
    section: ModelSection, kind: Kind, labels: Sequence[str] | None, problem: Problem | None
) -> Pretrained:
    """``load_pretrained`` without values: the base on ``meta``, and its tokenizer."""
    config = load_config(section)
    check_kind(config, kind, section.name_or_path)
    if kind == "encoder":
        for key, value in label_options(labels, problem).items():
            setattr(config, key, value)
    options: dict[str, Any] = {"dtype": getattr(torch, section.dtype)}
    if section.attn_implementation == "eager":
        options["attn_implementation"] = "eager"
    with explained(section.name_or_path), META, quiet():
        model: PreTrainedModel = loader(task_type_of(kind, problem)).from_config(
            config, trust_remote_code=section.trust_remote_code, **options
        )
    tokenizer, notes = load_tokenizer(section.name_or_path, hub_options(section))
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
