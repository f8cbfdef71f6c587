"""What a model is given to continue, and how transformers' ``generate`` is called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorakit.errors import DataError
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.ending import Reader
from lorakit.models.window import embedding_rows, window


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
