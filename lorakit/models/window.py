"""How many tokens a model takes: its context window, its positions and its embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.errors import UserError

if TYPE_CHECKING:  # slow to import, and not needed for a preview
    from transformers import PreTrainedConfig, PreTrainedModel

#: No model family reserves more positions than this.
_MAX_RESERVED = 16


def window(model: PreTrainedModel) -> int | None:
    """The model's context window in tokens; None if its configuration has no limit."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int) or found <= 0:
        return None
    return found - reserved_positions(model)


def position_limit(model: PreTrainedModel) -> int | None:
    """The most tokens of a row; None without a limit. Rotary embeddings extend beyond the positions
    that a model was trained on; learned ones do not."""
    return None if _is_rotary(model.config) else window(model)


def reserved_positions(model: PreTrainedModel) -> int:
    """The number of positions that no token can have. RoBERTa and its descendants start after the
    pad token's id: 514 positions for 512 tokens."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def embedding_rows(model: PreTrainedModel) -> int:
    """The number of rows of the model's input embeddings."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def fit_max_length(model: PreTrainedModel, config: Any, say: Callable[[str], None]) -> Any:
    """The task's ``config``, with a default ``max_length`` reduced to the context window.

    Raises UserError if the recipe itself asks for more."""
    limit, wanted = position_limit(model), config.max_length
    if limit is None or wanted <= limit:
        return config
    if "max_length" in config.model_fields_set:
        raise UserError(
            f"task.max_length = {wanted}: the model has {limit} positions; allowed: 1 to {limit}"
        )
    say(
        f"task.max_length: {limit} instead of the default {wanted}: the model has {limit} positions"
    )
    return config.model_copy(update={"max_length": limit})


def fit_unloaded(
    model_config: PreTrainedConfig, config: Any, say: Callable[[str], None], trust_remote_code: bool
) -> Any:
    """``fit_max_length`` for a model whose weights are not loaded."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    near = isinstance(positions, int) and config.max_length > positions - _MAX_RESERVED
    if not near or _is_rotary(model_config):
        return config
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(model_config, trust_remote_code=trust_remote_code)
    return fit_max_length(model, config, say)


def _is_rotary(config: PreTrainedConfig) -> bool:
    return getattr(config.get_text_config(), "rope_parameters", None) is not None
