"""Prompts in tokens -> continuations in text, many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorakit.errors import DataError
from lorakit.evaluation.watch import OnProgress, ShouldStop, Watch
from lorakit.models.window import embedding_rows, window

#: Rows of a batch unless the caller says otherwise: where throughput no longer grows.
ROWS_PER_BATCH = {"cpu": 64, "cuda": 128}
#: Tokens of a batch, prompts and what may follow: bounds the cache of keys and values.
TOKENS_PER_BATCH = 2**16
#: After so many tokens the rows that have ended leave the batch.
_TOKENS_PER_ROUND = 8


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> list[str]:
    """What the model continues each prompt with, in the prompts' order, without special tokens.

    ``temperature`` 0 takes the likeliest token each time; else tokens are drawn from torch's
    default generator, among the likeliest whose probabilities add up to ``top_p``. A continuation
    ends at an EOS token of the tokenizer or of the model's generation configuration, of which
    nothing else is taken; before a text of ``stop`` that stands behind its first visible
    character; or after ``max_new_tokens``.

    Raises DataError for a prompt that is empty or leaves no room in the model's window,
    EvaluationStopped if ``should_stop`` returns true.
    """
    check_prompts(model, prompts, max_new_tokens)
    watch = Watch(len(prompts), on_progress, should_stop)
    config = generation_config(model, tokenizer, temperature, top_p, return_dict_in_generate=True)
    groups = _same_prompts(prompts, distinct=temperature > 0)
    rows = batch_size or ROWS_PER_BATCH.get(model.device.type, 64)
    texts = [""] * len(prompts)
    with generating(model):
        for batch in _batches(groups, prompts, rows, max_new_tokens):
            batch_prompts = [prompts[group[0]] for group in batch]
            found = _Rounds(model, tokenizer, config, stop, watch).run(
                batch_prompts, max_new_tokens
            )
            for group, text in zip(batch, found, strict=True):
                for index in group:
                    texts[index] = text
            watch.advance(sum(map(len, batch)))
    return texts


def check_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raise DataError for a prompt that is empty, too long or in another model's tokens."""
    room, rows = window(model), embedding_rows(model)
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise DataError(f"prompt {number}: no token to continue")
        if (last := max(prompt)) >= rows:
            raise DataError(f"prompt {number}: the tokenizer does not belong to the model: "
                            f"id {last}, and {rows} embeddings")  # fmt: skip
        if room is not None and len(prompt) + max_new_tokens > room:
            raise DataError(
                f"prompt {number}: its {len(prompt)} tokens and max_new_tokens = {max_new_tokens} "
                f"exceed the model's window of {room} tokens"
            )


def generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
    top_p: float,
    **more: Any,
) -> GenerationConfig:
    """Nothing but what is said here and the EOS ids: a checkpoint's own temperature or repetition
    penalty would change scores unseen."""
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    return GenerationConfig(
        eos_token_id=eos_ids(model, tokenizer) or None,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
        **more,
    )


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a text, for the tokenizer or for the checkpoint."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({int(i) for i in ids if i is not None})


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


def before_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of ``stop`` behind its first visible character, and whether there
    is one."""
    start = len(text) - len(text.lstrip())
    places = [place for mark in stop if (place := text.find(mark, start)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


class _Rounds:
    """One batch, a few tokens at a time; between rounds the rows that have ended leave it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GenerationConfig,
        stop: Sequence[str],
        watch: Watch,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.config = config
        self.stop = stop
        self.watch = watch
        self.eos = set(config.eos_token_id or ())

    def run(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        texts = [""] * len(prompts)
        ids, mask = self._left_padded(prompts)
        width = ids.shape[1]
        alive = list(range(len(prompts)))
        cache = None
        while alive:
            self.watch.check()
            made = ids.shape[1] - width
            tokens = min(_TOKENS_PER_ROUND, max_new_tokens - made)
            ids, mask, cache = self._round(ids, mask, cache, tokens)
            read = [self._read(row) for row in ids[:, width:].tolist()]
            for row, (text, _) in zip(alive, read, strict=True):
                texts[row] = text
            if made + tokens >= max_new_tokens:
                break
            kept = [i for i, (_, ended) in enumerate(read) if not ended]
            alive = [alive[i] for i in kept]
            if alive and len(kept) < len(read):
                index = torch.tensor(kept, device=ids.device)
                ids, mask, cache = ids[index], mask[index], _select(cache, index)
        return texts

    def _round(
        self, ids: Tensor, mask: Tensor, cache: Any, tokens: int
    ) -> tuple[Tensor, Tensor, Any]:
        self.config.max_new_tokens = tokens
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=self.config,
        )
        new = mask.new_ones(mask.shape[0], out.sequences.shape[1] - mask.shape[1])
        return out.sequences, torch.cat([mask, new], dim=1), out.past_key_values

    def _read(self, ids: list[int]) -> tuple[str, bool]:
        """The text so far, and whether it has come to its end."""
        end = next((i for i, token in enumerate(ids) if token in self.eos), None)
        text = str(self.tokenizer.decode(
            ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        ))  # fmt: skip
        text, stopped = before_stop(text, self.stop)
        return text, end is not None or stopped

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _select(cache: Any, index: Tensor) -> Any:
    """The cache of some rows; None, from which it is made anew, where it cannot be taken apart."""
    layers = getattr(cache, "layers", ())
    if not layers or not all(hasattr(layer, "batch_select_indices") for layer in layers):
        return None
    cache.batch_select_indices(index)
    return cache


def _same_prompts(prompts: Sequence[Sequence[int]], distinct: bool) -> list[list[int]]:
    """The rows of each prompt: without sampling, equal prompts have one continuation."""
    if distinct:
        return [[index] for index in range(len(prompts))]
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(index)
    return list(rows.values())


def _batches(
    groups: list[list[int]], prompts: Sequence[Sequence[int]], rows: int, max_new_tokens: int
) -> Iterator[list[list[int]]]:
    """Prompts of like length together, the longest first."""
    batch: list[list[int]] = []
    for group in sorted(groups, key=lambda group: -len(prompts[group[0]])):
        width = len(prompts[(batch[0] if batch else group)[0]]) + max_new_tokens
        if batch and (len(batch) == rows or (len(batch) + 1) * width > TOKENS_PER_BATCH):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch
