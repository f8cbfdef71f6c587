"""How many sequences are generated at once.

A step costs a small model nearly the same for one sequence as for thousands, so a batch is as large
as the keys and values that it keeps may be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

#: Where throughput no longer grows.
MOST_SEQUENCES = {"cpu": 64, "cuda": 2048}
#: Tokens of a batch where there is no memory of a device to go by: prompts and what may follow.
MOST_TOKENS = 2**16
#: Of a device's memory for one batch; of what is free of it at most half.
_SHARE = 1 / 8


@dataclass(frozen=True)
class Room:
    """``token_bytes`` are kept for a token of a sequence, ``sequence_bytes`` for its scores;
    ``most_bytes`` is None where MOST_TOKENS bounds a batch."""

    most_sequences: int
    token_bytes: int
    sequence_bytes: int
    most_bytes: int | None

    def sequences(self, tokens: int) -> int:
        """How many sequences of so many tokens fit. Of memory a power of two, so that a little
        more or less of it changes no batch, which in half precision would change texts."""
        if self.most_bytes is None:
            return max(1, min(MOST_TOKENS // tokens, self.most_sequences))
        fits = self.most_bytes // (self.token_bytes * tokens + self.sequence_bytes)
        fits = max(1, min(fits, self.most_sequences))
        return int(1 << (fits.bit_length() - 1))


def room_for(model: PreTrainedModel) -> Room:
    device = model.device
    most_sequences = MOST_SEQUENCES.get(device.type, MOST_SEQUENCES["cpu"])
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if device.type != "cuda" or not heads:
        return Room(most_sequences, 0, 0, None)
    keys = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = config.num_hidden_layers
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Room(
        most_sequences,
        token_bytes=2 * layers * keys * head_dim * model.dtype.itemsize,
        # Scores in float32, and the copies that choosing a token makes of them.
        sequence_bytes=16 * config.vocab_size,
        most_bytes=min(int(total * _SHARE), free // 2),
    )
