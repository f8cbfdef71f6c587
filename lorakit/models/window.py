"""How many tokens a model takes at once."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.errors import UserError


def window(model: PreTrainedModel) -> int | None:
    """How many tokens the model was made for; None where its configuration does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int) or found <= 0:
        return None
    return found - reserved_positions(model)


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Raise UserError if rows of ``max_length`` tokens have no position in the model. Rotary
    positions go on past what a model was trained on, learnt ones do not."""
    room = window(model)
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None) is not None
    if room is not None and max_length > room and not rotary:
        raise UserError(
            f"task.max_length = {max_length}: the model has {room} positions; allowed: 1 to {room}"
        )


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
