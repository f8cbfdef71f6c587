"""Prompts in tokens -> continuations in text, many at a time.

Prompts of like length make a batch, padded on the left. Equal prompts are continued once where
nothing is drawn. In float32 a text depends neither on the batch it is made in nor on the order of
the prompts: a row sees no padding, and what is drawn for it is drawn from its own number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.evaluation.beams import search
from lorakit.evaluation.choosing import Draw, processors, uniform_numbers
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.ending import Reader, eos_ids
from lorakit.evaluation.kv_cache import cache_argument, cache_of, select_rows
from lorakit.evaluation.prepare import generating, generation_config, left_padded, prompt_limits
from lorakit.evaluation.room import Room, room_for
from lorakit.evaluation.watch import Watch

#: After so many tokens the rows that have ended leave the batch.
_TOKENS_PER_ROUND = 8


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    rows: Sequence[int] | None = None,
    batch_size: int | None = None,
    watch: Watch | None = None,
) -> list[str]:
    """What the model continues each prompt with, in the prompts' order, without special tokens.

    A continuation ends at an EOS token of the tokenizer or of the model's generation
    configuration, of which nothing else is taken; before a text of ``decoding.stop``; or after
    ``decoding.max_new_tokens`` (with ``decoding.fit_window`` at the end of the window at the
    latest). ``rows`` are the prompts' numbers (by default 0, 1, ...), from which, with the seed,
    their random numbers come. ``batch_size`` is in prompts; None takes as many as ``room_for``
    says, a beam counting as a sequence.

    Raises DataError for a prompt that is empty or leaves no room in the model's window,
    EvaluationStopped if ``watch`` is told to stop.
    """
    limits = prompt_limits(model, tokenizer, prompts, decoding)
    numbers = range(len(prompts)) if rows is None else rows
    watch = watch or Watch(len(prompts))
    reader = Reader(tokenizer, frozenset(eos_ids(model, tokenizer)), decoding.stop)
    groups = _same_prompts(prompts, distinct=decoding.draws)
    texts = [""] * len(prompts)
    with generating(model):
        for batch, how in _batches(groups, prompts, limits, decoding, batch_size, room_for(model)):
            first = [group[0] for group in batch]
            chosen = [prompts[index] for index in first]
            if how.num_beams > 1:
                found = search(model, chosen, how, reader, watch)
            else:
                rounds = _Rounds(model, how, reader, watch)
                found = rounds.run(chosen, [numbers[index] for index in first])
            for group, text in zip(batch, found, strict=True):
                for index in group:
                    texts[index] = text
            watch.advance(sum(map(len, batch)))
    return texts


class _Rounds:
    """One batch, a few tokens at a time; between rounds the rows that have ended leave it."""

    def __init__(
        self, model: PreTrainedModel, decoding: Decoding, reader: Reader, watch: Watch
    ) -> None:
        self.model: Any = model
        self.decoding = decoding
        self.reader = reader
        self.watch = watch
        self.config = generation_config(reader, return_dict_in_generate=True)

    def run(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[str]:
        texts = [""] * len(prompts)
        ids, mask = left_padded(prompts, self.reader.tokenizer, self.model.device)
        width, most = ids.shape[1], self.decoding.max_new_tokens
        draw = self._draw(rows, width)
        chosen_by = processors(self.decoding, width, draw)
        alive = list(range(len(prompts)))
        cache = None
        while alive:
            self.watch.check()
            made = ids.shape[1] - width
            self.config.max_new_tokens = min(_TOKENS_PER_ROUND, most - made)
            ids, mask, cache = self._round(ids, mask, cache, chosen_by)
            read = [self.reader.read(row) for row in ids[:, width:].tolist()]
            for row, (text, _) in zip(alive, read, strict=True):
                texts[row] = text
            if ids.shape[1] - width >= most:
                break
            kept = [i for i, (_, ended) in enumerate(read) if not ended]
            alive = [alive[i] for i in kept]
            if alive and len(kept) < len(read):
                index = torch.tensor(kept, device=ids.device)
                ids, mask, cache = ids[index], mask[index], select_rows(cache, index)
                if draw is not None:
                    draw.keep(index)
        return texts

    def _draw(self, rows: Sequence[int], width: int) -> Draw | None:
        how = self.decoding
        if not how.draws:
            return None
        numbers = uniform_numbers(how.seed, rows, how.max_new_tokens, self.model.device)
        return Draw(how.temperature, how.top_p, numbers, width)

    def _round(
        self, ids: Tensor, mask: Tensor, cache: Any, chosen_by: Any
    ) -> tuple[Tensor, Tensor, Any]:
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=self.config,
            logits_processor=chosen_by,
            **cache_argument(cache),
        )
        new = mask.new_ones(mask.shape[0], out.sequences.shape[1] - mask.shape[1])
        return out.sequences, torch.cat([mask, new], dim=1), cache_of(self.model, out)


def _same_prompts(prompts: Sequence[Sequence[int]], distinct: bool) -> list[list[int]]:
    """The rows of each prompt: without sampling, equal prompts have one continuation."""
    if distinct:
        return [[index] for index in range(len(prompts))]
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(index)
    return list(rows.values())


def _batches(
    groups: list[list[int]],
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    decoding: Decoding,
    batch_size: int | None,
    room: Room,
) -> Iterator[tuple[list[list[int]], Decoding]]:
    """Prompts of like length and of one limit together, the longest first."""
    for limit in sorted({limits[group[0]] for group in groups}):
        how = replace(decoding, max_new_tokens=limit)
        ordered = [group for group in groups if limits[group[0]] == limit]
        ordered.sort(key=lambda group: -len(prompts[group[0]]))
        start = 0
        while start < len(ordered):
            width = len(prompts[ordered[start][0]]) + limit
            size = batch_size or max(1, room.sequences(width) // how.num_beams)
            yield ordered[start : start + size], how
            start += size
