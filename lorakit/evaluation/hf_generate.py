"""What a model is given to continue, and how transformers' ``generate`` is called.

The keys and values of one ``generate`` call, handed on to the next.

How many sequences are generated at once.

A step costs a small model nearly the same for one sequence as for thousands, so a batch is as large
as the keys and values that it keeps may be.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.utils import GenerateDecoderOnlyOutput

from lorakit.errors import DataError
from lorakit.evaluation.sampling import Decoding, Reader
from lorakit.models.load import embedding_rows, window


def prompt_limits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
) -> list[int]:
    """How many tokens may follow each prompt: ``max_new_tokens``, or with ``fit_window`` what the
    prompt leaves of the model's window, if that is less.

    Raises DataError for a prompt that is empty, too long or in another model's tokens, and for a
    pad token that the model has no embedding for.
    """
    room, rows = window(model), embedding_rows(model)
    if (pad := pad_id(tokenizer)) >= rows:
        raise DataError("the tokenizer does not belong to the model: "
                        f"its pad token has id {pad}, and {rows} embeddings")  # fmt: skip
    limits = []
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise DataError(f"prompt {number}: no token to continue")
        if (last := max(prompt)) >= rows:
            raise DataError(f"prompt {number}: the tokenizer does not belong to the model: "
                            f"id {last}, and {rows} embeddings")  # fmt: skip
        limit = decoding.max_new_tokens
        if room is not None and len(prompt) + limit > room:
            _check_room(number, len(prompt), room, decoding)
            limit = room - len(prompt)
        limits.append(limit)
    return limits


def _check_room(number: int, tokens: int, room: int, decoding: Decoding) -> None:
    """Raise DataError unless the answer to a prompt of so many tokens may be shortened."""
    if tokens >= room:
        raise DataError(
            f"prompt {number}: its {tokens} tokens fill the model's window of {room} tokens, with "
            f"no room for an answer; allowed: at most {room - 1}"
        )
    if not decoding.fit_window:
        raise DataError(
            f"prompt {number}: its {tokens} tokens and max_new_tokens = "
            f"{decoding.max_new_tokens} exceed the model's window of {room} tokens; allowed: "
            f"max_new_tokens of at most {room - tokens}"
        )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer sets a pad token"
    return tokenizer.pad_token_id


def left_padded(
    prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask``, (rows, longest prompt)."""
    width, pad = max(map(len, prompts)), pad_id(tokenizer)
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def generation_config(reader: Reader, **more: Any) -> GenerationConfig:
    """Nothing but what is said here and the EOS ids: a checkpoint's own temperature or repetition
    penalty would change scores unseen. Nothing is drawn by transformers."""
    return GenerationConfig(
        eos_token_id=sorted(reader.eos) or None,
        pad_token_id=pad_id(reader.tokenizer),
        do_sample=False,
        **more,
    )


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients and without the checkpoint's generation defaults, which
    ``generate`` would take for all that is not set."""
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    hook = model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    try:
        with torch.no_grad():
            yield
    finally:
        hook.remove()
        model.generation_config = own
        model.train(was_training)


def _contiguous(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The last position's hidden states in one piece: given a slice of three dimensions, torch
    multiplies by a copy of a frozen weight for each row, gigabytes for a large vocabulary."""
    return (inputs[0].contiguous(), *inputs[1:])


_FIELDS = {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)}
#: Early releases of transformers 5 say ``past_key_values``; later ones deprecate it for ``cache``.
_OUTPUT = "cache" if "cache" in _FIELDS else "past_key_values"


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument with which ``generate`` goes on from ``cache`` (None: none)."""
    return {} if cache is None else {_OUTPUT: cache}


def cache_of(model: PreTrainedModel, output: Any) -> Any:
    """The cache that a ``generate`` call with ``return_dict_in_generate`` returns; None, from which
    it is made anew, for the Mamba models of early releases: they do not go on from one."""
    if _OUTPUT != "cache" and "cache_params" in inspect.signature(model.forward).parameters:
        return None
    return getattr(output, _OUTPUT, None)


def select_rows(cache: Any, index: Tensor) -> Any:
    """The cache of some rows; None, from which it is made anew, where it cannot be taken apart."""
    layers = getattr(cache, "layers", ())
    if not layers or not all(hasattr(layer, "batch_select_indices") for layer in layers):
        return None
    cache.batch_select_indices(index)
    return cache


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
