"""Beam search, a batch at a time, through transformers' ``generate``.

A continuation's score is the sum of its log probabilities / length ** length_penalty; the length
is in generated tokens and counts the EOS, or the tokens of the stop text, that end it. A
hypothesis that ends with a stop text is finished and ranked there, as one that ends with an EOS.
The search of a row ends when ``num_beams`` hypotheses are finished and the best running one, at
its present length, scores below the worst of them (transformers' ``early_stopping=False``), or at
``max_new_tokens``, where the running ones are ranked too.

The LoRA authors' ``examples/NLG/src/gpt2_beam.py`` has the same score, length and n-gram rule. It
differs in two things. It searches to ``eval_len`` tokens in any case, so a longer hypothesis may
still win there. And it looks at the best ``num_beams`` candidates of a step, of which those that
finish leave no place to others; transformers looks at twice as many or more, so that ``num_beams``
always run.

Prompts in tokens -> continuations in text, many at a time.

Prompts of like length make a batch, padded on the left. Equal prompts are continued once where
nothing is drawn. In float32 a text depends neither on the batch it is made in nor on the order of
the prompts: a row sees no padding, and what is drawn for it is drawn from its own number.

One continuation, handed out as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lorakit.evaluation.hf_generate import (
    Room,
    cache_argument,
    cache_of,
    generating,
    generation_config,
    left_padded,
    prompt_limits,
    room_for,
    select_rows,
)
from lorakit.evaluation.progress import Watch
from lorakit.evaluation.sampling import (
    Decoding,
    Draw,
    Ended,
    Reader,
    eos_ids,
    processors,
    uniform_numbers,
)


def search(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    reader: Reader,
    watch: Watch,
) -> list[str]:
    """The best continuation of each prompt. Raises EvaluationStopped between two tokens."""
    ids, mask = left_padded(prompts, reader.tokenizer, model.device)
    width = ids.shape[1]
    generate: Any = model.generate
    found = generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=generation_config(
            reader,
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            length_penalty=decoding.length_penalty,
            early_stopping=False,
        ),
        logits_processor=processors(decoding, width),
        stopping_criteria=StoppingCriteriaList([Ended(reader, width, watch.check)]),
    )
    # Behind its end a row is filled up, for a model without EOS with -1.
    rows = found[:, width:].tolist()
    return [reader.read([token for token in row if token >= 0])[0] for row in rows]


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


#: What bytes that are no whole character decode to.
_HALF_A_CHARACTER = "\ufffd"


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    write: Callable[[str], None],
    decoding: Decoding,
    *,
    row: int = 0,
) -> str:
    """Continue ``prompt`` as ``generate_text`` does; ``write`` gets the text piece by piece, and
    what a search with beams finds in one piece at its end. ``row`` is the prompt's number. Returns
    the whole. Raises DataError for a prompt that is empty or too long."""
    if decoding.num_beams > 1:
        text = generate_text(model, tokenizer, [prompt], decoding)[0]
        write(text)
        return text
    (most,) = prompt_limits(model, tokenizer, [prompt], decoding)
    reader = Reader(tokenizer, frozenset(eos_ids(model, tokenizer)), decoding.stop)
    ids, mask = left_padded([prompt], tokenizer, model.device)
    draw = None
    if decoding.draws:
        numbers = uniform_numbers(decoding.seed, [row], most, model.device)
        draw = Draw(decoding.temperature, decoding.top_p, numbers, len(prompt))
    streamer = _Pieces(reader, write)
    generate: Any = model.generate
    with generating(model):
        generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=generation_config(reader, max_new_tokens=most),
            logits_processor=processors(decoding, len(prompt), draw),
            stopping_criteria=StoppingCriteriaList([Ended(reader, len(prompt))]),
            streamer=streamer,
        )
    return streamer.written


class _Pieces(BaseStreamer):
    """What may still change with the next token waits for it: the bytes of half a character, and
    what may be the beginning of a stop text."""

    def __init__(self, reader: Reader, write: Callable[[str], None]) -> None:
        self.written = ""
        self._reader = reader
        self._write = write
        self._ids: list[int] | None = None

    def put(self, value: Tensor) -> None:
        if self._ids is None:  # the prompt comes first
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text, ended = self._reader.read(self._ids)
        if not ended:
            text = text.rstrip(_HALF_A_CHARACTER)
            text = text[: len(text) - _begun(text, self._reader.stop)]
        self._hand_out(text)

    def end(self) -> None:
        self._hand_out(self._reader.read(self._ids or [])[0])

    def _hand_out(self, text: str) -> None:
        if piece := text[len(self.written) :]:
            self._write(piece)
            self.written += piece


def _begun(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the text's end may be the beginning of a stop text."""
    begun = [k for mark in stop for k in range(1, len(mark)) if text.endswith(mark[:k])]
    return max(begun, default=0)
