"""Prepare calls of transformers' ``generate``: inputs, limits, configuration, cache, batch size."""

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
from lorakit.evaluation.sampling import Decoding, OutputReader
from lorakit.models.window import embedding_rows, window

#: transformers 5 renamed ``past_key_values`` to ``cache`` in a later release.
_FIELDS = {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)}
_CACHE = "cache" if "cache" in _FIELDS else "past_key_values"

#: The number of sequences beyond which throughput no longer grows.
MAX_SEQUENCES = {"cpu": 64, "cuda": 2048}
#: The maximum tokens of a batch, prompts and continuations, on the CPU.
MAX_TOKENS = 2**16
#: The fraction of a device's memory for one batch, which also takes at most half of what is free.
_MEMORY_SHARE = 1 / 8


def prompt_limits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
) -> list[int]:
    """Return the maximum number of tokens to generate after each prompt.

    That is ``max_new_tokens``, or with ``fit_window`` the rest of the model's window if it is less.
    Raises DataError for a prompt that is empty, too long, or tokenized for another model, and for a
    pad token without an embedding.
    """
    room, rows = window(model), embedding_rows(model)
    if (pad := pad_id(tokenizer)) >= rows:
        raise DataError(
            f"the tokenizer does not match the model: its pad token has id {pad}, but the model "
            f"has {rows} embeddings"
        )
    limits = []
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise DataError(f"prompt {number}: no token to continue")
        if (last := max(prompt)) >= rows:
            raise DataError(
                f"prompt {number}: the tokenizer does not match the model: it produces id "
                f"{last}, but the model has {rows} embeddings"
            )
        limit = decoding.max_new_tokens
        if room is not None and len(prompt) + limit > room:
            _check_room(number, len(prompt), room, decoding)
            limit = room - len(prompt)
        limits.append(limit)
    return limits


def _check_room(number: int, tokens: int, room: int, decoding: Decoding) -> None:
    """Raise DataError unless the continuation of a prompt of ``tokens`` may be shortened."""
    if tokens >= room:
        raise DataError(
            f"prompt {number}: its {tokens} tokens fill the model's window of {room} tokens and "
            f"leave no room for an answer; allowed: at most {room - 1}"
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


def left_pad(
    prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ``input_ids`` and ``attention_mask``, both (prompts, longest prompt)."""
    width, pad = max(map(len, prompts)), pad_id(tokenizer)
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def generation_config(reader: OutputReader, **more: Any) -> GenerationConfig:
    """Return a configuration with only the EOS and pad ids and ``more``.

    The temperature or repetition penalty of a checkpoint would silently change scores. Sampling is
    left to ``SampleToken``.
    """
    return GenerationConfig(
        eos_token_id=sorted(reader.eos) or None,
        pad_token_id=pad_id(reader.tokenizer),
        do_sample=False,
        **more,
    )


@contextmanager
def generation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and without the checkpoint's generation config,
    from which ``generate`` would take all settings that are not given."""
    was_training, config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    hook = model.get_output_embeddings().register_forward_pre_hook(_make_contiguous)
    try:
        with torch.no_grad():
            yield
    finally:
        hook.remove()
        model.generation_config = config
        model.train(was_training)


def _make_contiguous(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make the last position's hidden states contiguous: for a non-contiguous 3-D input, torch
    copies a frozen weight for each row, gigabytes for a large vocabulary."""
    return (inputs[0].contiguous(), *inputs[1:])


# The keys and values of one ``generate`` call, passed to the next


def cache_argument(cache: Any) -> dict[str, Any]:
    """Return the keyword argument that makes ``generate`` continue from ``cache``."""
    return {} if cache is None else {_CACHE: cache}


def output_cache(model: PreTrainedModel, output: Any) -> Any:
    """Return the cache of a ``generate`` call with ``return_dict_in_generate``.

    Returns None, so that the next call recomputes it, for the Mamba models of early releases, which
    cannot continue from a cache.
    """
    if _CACHE != "cache" and "cache_params" in inspect.signature(model.forward).parameters:
        return None
    return getattr(output, _CACHE, None)


def select_rows(cache: Any, index: Tensor) -> Any:
    """Return the cache of some rows; None, so that it is recomputed, if it cannot be split."""
    layers = getattr(cache, "layers", ())
    if not layers or not all(hasattr(layer, "batch_select_indices") for layer in layers):
        return None
    cache.batch_select_indices(index)
    return cache


# The batch size


@dataclass(frozen=True)
class BatchCapacity:
    """How many sequences fit into one batch.

    For a small model, generating a token takes nearly the same time for one sequence as for
    thousands, so a batch is as large as memory allows. ``token_bytes`` is the size of the keys and
    values of a token, ``sequence_bytes`` that of a sequence's scores; without ``max_bytes``,
    ``MAX_TOKENS`` is the limit.
    """

    max_sequences: int
    token_bytes: int
    sequence_bytes: int
    max_bytes: int | None

    def sequences(self, tokens: int) -> int:
        """Return how many sequences of ``tokens`` tokens fit.

        If memory is the limit, this is a power of two, so that small differences in free memory do
        not change batches, which in half precision would change texts.
        """
        if self.max_bytes is None:
            return max(1, min(MAX_TOKENS // tokens, self.max_sequences))
        fits = self.max_bytes // (self.token_bytes * tokens + self.sequence_bytes)
        fits = max(1, min(fits, self.max_sequences))
        return int(1 << (fits.bit_length() - 1))


def batch_capacity(model: PreTrainedModel) -> BatchCapacity:
    """Return the capacity of the model's device for one batch."""
    device = model.device
    max_sequences = MAX_SEQUENCES.get(device.type, MAX_SEQUENCES["cpu"])
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if device.type != "cuda" or not heads:
        return BatchCapacity(max_sequences, 0, 0, None)
    keys = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = config.num_hidden_layers
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return BatchCapacity(
        max_sequences,
        token_bytes=2 * layers * keys * head_dim * model.dtype.itemsize,
        # Scores in float32, and their copies while a token is chosen.
        sequence_bytes=16 * config.vocab_size,
        max_bytes=min(int(total * _MEMORY_SHARE), free // 2),
    )
