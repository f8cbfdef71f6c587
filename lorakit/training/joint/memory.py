"""How many members of a joint training the memory holds.

The base is there once; each member adds its adapter with gradients and optimizer state, and the
activations of its rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorakit import registry
from lorakit.distributed.group import processes_on_host
from lorakit.host.resources import host_memory
from lorakit.injection import inject, trainable_state
from lorakit.models.load import load_empty
from lorakit.recipe.sections import Recipe

#: Activations that the backward pass needs, for each token and layer: so many times the hidden size
#: and the width of the MLP. Measured on Llama and BERT, with norms and dropout in float32.
_HIDDEN_TENSORS, _MLP_TENSORS = 16, 4
#: Weight, gradient and AdamW's two averages, in float32.
_BYTES_PER_PARAMETER = 16
#: The part of the memory that is planned with; graphs and fragments take the rest.
_USABLE = 0.8


def members_that_fit(recipes: Sequence[Recipe], device: torch.device) -> int:
    """Estimate how many of ``recipes``, of which any two ``can_join``, fit on ``device`` at a time:
    at least 1. It is the number for the largest of them, and no weights are loaded."""
    model = empty_base(recipes[0])
    adapters = {r.adapter.model_dump_json(): r for r in recipes}
    trained = {key: trained_parameters(r, model) for key, r in adapters.items()}
    largest = max(
        member_bytes(recipe, model, trained[recipe.adapter.model_dump_json()]) for recipe in recipes
    )
    left = _available_bytes(device) * _USABLE - base_bytes(recipes[0], model)
    return max(1, min(len(recipes), int(left / largest)))


def base_bytes(recipe: Recipe, model: nn.Module) -> int:
    """The memory of the base, which is there once. ``model`` may be on ``meta``."""
    return sum(p.numel() for p in model.parameters()) * _element_bytes(recipe)


def member_bytes(recipe: Recipe, model: Any, trained: int) -> int:
    """What a member with so many ``trained`` parameters adds to the base: these and the activations
    of a batch."""
    activations = _activations(recipe, model.config.get_text_config())
    return trained * _BYTES_PER_PARAMETER + activations


def trained_parameters(recipe: Recipe, model: nn.Module) -> int:
    own = copy.deepcopy(model)
    config = recipe.adapter
    if getattr(config, "init", "default") != "default":  # pissa needs the weights
        config = config.model_copy(update={"init": "default"})
    with torch.random.fork_rng(devices=[]):
        inject(own, config, heads=())
    return sum(p.numel() for p in trainable_state(own).values())


def _activations(recipe: Recipe, config: Any) -> int:
    section, tokens = recipe.train, _tokens(recipe)
    hidden = config.hidden_size
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    layers = config.num_hidden_layers
    layer = _HIDDEN_TENSORS * hidden + _MLP_TENSORS * mlp
    elements: int = layers * hidden + layer if section.gradient_checkpointing else layers * layer
    return tokens * elements * _element_bytes(recipe)


def _tokens(recipe: Recipe) -> int:
    section, rows = recipe.train, recipe.train.units_per_batch
    limits = [section.max_tokens_per_batch, rows and rows * recipe.task.max_length]
    return min(limit for limit in limits if limit)


def _element_bytes(recipe: Recipe) -> int:
    return torch.finfo(getattr(torch, recipe.model.dtype)).bits // 8


def empty_base(recipe: Recipe) -> Any:
    """The model of the recipe on ``meta``."""
    return load_empty(recipe.model, registry.task(recipe.task.name).kind)


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    memory = host_memory()
    available = memory.total_bytes if memory.available_bytes is None else memory.available_bytes
    return available // processes_on_host()
