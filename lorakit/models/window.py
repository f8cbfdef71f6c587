"""How many tokens a model takes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from lorakit.errors import UserError

#: No family keeps as many positions for itself.
_MOST_RESERVED = 16


def window(model: PreTrainedModel) -> int | None:
    """How many tokens the model was made for; None where its configuration does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int) or found <= 0:
        return None
    return found - reserved_positions(model)


def fit_max_length(model: PreTrainedModel, config: Any, say: Callable[[str], None]) -> Any:
    """The task's ``config``, with a default ``max_length`` shortened to the model's positions,
    which is said. Raises UserError if the recipe itself asks for more. Rotary positions go on past
    what a model was trained on, learnt ones do not."""
    room, wanted = window(model), config.max_length
    if room is None or wanted <= room or _is_rotary(model.config):
        return config
    if "max_length" in config.model_fields_set:
        raise UserError(
            f"task.max_length = {wanted}: the model has {room} positions; allowed: 1 to {room}"
        )
    say(f"task.max_length: {room} in place of the default {wanted}: the model has {room} positions")
    return config.model_copy(update={"max_length": room})


def fit_unloaded(
    model_config: PreTrainedConfig, config: Any, say: Callable[[str], None], trust_remote_code: bool
) -> Any:
    """``fit_max_length`` for a model of which only the configuration is loaded."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    near = isinstance(positions, int) and config.max_length > positions - _MOST_RESERVED
    if not near or _is_rotary(model_config):
        return config
    with torch.device("meta"):
        model = AutoModel.from_config(model_config, trust_remote_code=trust_remote_code)
    return fit_max_length(model, config, say)


def _is_rotary(config: PreTrainedConfig) -> bool:
    return getattr(config.get_text_config(), "rope_parameters", None) is not None


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model has embeddings for: ids 0 to one less."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def reserved_positions(model: PreTrainedModel) -> int:
    """RoBERTa and its kin count positions from behind the pad token's id: 514 rows, 512 tokens."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
