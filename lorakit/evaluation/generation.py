"""Generate text from token prompts, in batches or streamed from a single prompt.

Prompts of similar length form a batch, padded on the left. Without sampling, each distinct prompt
is continued only once. In float32 a text depends neither on its batch nor on the order of the
prompts: a row ignores the padding, and is sampled with separate random numbers.

Beam search is that of transformers. A continuation's score is the sum of its log probabilities /
length ** length_penalty; the length is in generated tokens, including the EOS or the stop sequence.
A hypothesis that ends in a stop sequence is finished and ranked like one that ends in EOS. A row's
search ends when ``num_beams`` hypotheses are finished and the best running one, at its current
length, scores below the worst of them (``early_stopping=False``), or at ``max_new_tokens``, where
the running ones are ranked too.

The LoRA authors' ``examples/NLG/src/gpt2_beam.py`` uses the same score, length and n-gram rule, but
always searches up to ``eval_len`` tokens, so a longer hypothesis may still win. It also considers
only the best ``num_beams`` candidates per token, and a finished one leaves its beam empty;
transformers considers at least twice as many, so that ``num_beams`` hypotheses keep running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lorakit.evaluation.hf_generate import (
    BatchCapacity,
    batch_capacity,
    cache_argument,
    generation_config,
    generation_mode,
    left_pad,
    output_cache,
    prompt_limits,
    select_rows,
)
from lorakit.evaluation.progress import ProgressMonitor
from lorakit.evaluation.sampling import (
    Decoding,
    OutputReader,
    StopAtEnd,
    eos_ids,
    logits_processors,
    sampler,
)

#: Finished rows leave their batch after this many tokens.
_TOKENS_PER_ROUND = 8
#: What incomplete UTF-8 decodes to.
_REPLACEMENT_CHARACTER = "\ufffd"


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    rows: Sequence[int] | None = None,
    batch_size: int | None = None,
    capacity: BatchCapacity | None = None,
    monitor: ProgressMonitor | None = None,
) -> list[str]:
    """Return the model's continuation of each prompt, without special tokens.

    A continuation ends at an EOS token of the tokenizer or of the model's generation config (whose
    other settings are ignored), before a stop sequence, or after ``decoding.max_new_tokens`` (with
    ``decoding.fit_window``, at the latest at the end of the model's window). ``rows`` are the
    prompts' numbers, by default 0, 1, ...; they and the seed determine the random numbers.
    ``batch_size`` is in prompts and defaults to what ``capacity``, by default
    ``batch_capacity``, allows, where each beam counts as a sequence.

    Raises DataError for a prompt that is empty or leaves no room in the model's window, and
    EvaluationStopped if ``monitor`` raises it.
    """
    limits = prompt_limits(model, tokenizer, prompts, decoding)
    numbers = range(len(prompts)) if rows is None else rows
    monitor = monitor or ProgressMonitor(len(prompts))
    reader = OutputReader(tokenizer, frozenset(eos_ids(model, tokenizer)), decoding.stop)
    groups = _equal_prompts(prompts, distinct=decoding.samples)
    capacity = capacity or batch_capacity(model)
    texts = [""] * len(prompts)
    with generation_mode(model):
        for batch, limited in _batches(groups, prompts, limits, decoding, batch_size, capacity):
            first = [group[0] for group in batch]
            chosen = [prompts[index] for index in first]
            generator = _BatchGenerator(model, limited, reader, monitor)
            if limited.num_beams > 1:
                found = generator.search(chosen)
            else:
                found = generator.step_by_step(chosen, [numbers[index] for index in first])
            for group, text in zip(batch, found, strict=True):
                for index in group:
                    texts[index] = text
            monitor.advance(sum(map(len, batch)))
    return texts


@dataclass(frozen=True)
class _BatchGenerator:
    """Generates the continuations of one batch."""

    model: Any
    decoding: Decoding
    reader: OutputReader
    monitor: ProgressMonitor

    def search(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Search with beams. Raises EvaluationStopped between two tokens."""
        ids, mask = left_pad(prompts, self.reader.tokenizer, self.model.device)
        width = ids.shape[1]
        found = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=generation_config(
                self.reader,
                max_new_tokens=self.decoding.max_new_tokens,
                num_beams=self.decoding.num_beams,
                length_penalty=self.decoding.length_penalty,
                early_stopping=False,
            ),
            logits_processor=logits_processors(self.decoding, width),
            stopping_criteria=StoppingCriteriaList(
                [StopAtEnd(self.reader, width, self.monitor.check)]
            ),
        )
        # Finished rows are padded, for a model without EOS with -1.
        rows = found[:, width:].tolist()
        return [self.reader.read([token for token in row if token >= 0])[0] for row in rows]

    def step_by_step(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[str]:
        """Generate token by token, a few at a time; finished rows then leave the batch."""
        texts = [""] * len(prompts)
        ids, mask = left_pad(prompts, self.reader.tokenizer, self.model.device)
        width, limit = ids.shape[1], self.decoding.max_new_tokens
        sample = sampler(self.decoding, rows, width, self.model.device)
        processors = logits_processors(self.decoding, width, sample)
        config = generation_config(self.reader, return_dict_in_generate=True)
        alive = list(range(len(prompts)))
        cache = None
        while alive:
            self.monitor.check()
            config.max_new_tokens = min(_TOKENS_PER_ROUND, limit - (ids.shape[1] - width))
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=processors,
                **cache_argument(cache),
            )
            ids, cache = output.sequences, output_cache(self.model, output)
            mask = _extended(mask, ids.shape[1])
            read = [self.reader.read(row) for row in ids[:, width:].tolist()]
            for row, (text, _) in zip(alive, read, strict=True):
                texts[row] = text
            if ids.shape[1] - width >= limit:
                break
            kept = [i for i, (_, ended) in enumerate(read) if not ended]
            alive = [alive[i] for i in kept]
            if alive and len(kept) < len(read):
                index = torch.tensor(kept, device=ids.device)
                ids, mask, cache = ids[index], mask[index], select_rows(cache, index)
                if sample is not None:
                    sample.keep_rows(index)
        return texts


def _extended(mask: Tensor, width: int) -> Tensor:
    """Return the attention mask, extended with ones for the generated tokens."""
    return torch.cat([mask, mask.new_ones(mask.shape[0], width - mask.shape[1])], dim=1)


def _equal_prompts(prompts: Sequence[Sequence[int]], distinct: bool) -> list[list[int]]:
    """Group the indices of equal prompts, unless they are to be kept ``distinct`` for sampling."""
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
    capacity: BatchCapacity,
) -> Iterator[tuple[list[list[int]], Decoding]]:
    """Yield batches of prompts of one limit and similar length, the longest first."""
    for limit in sorted({limits[group[0]] for group in groups}):
        limited = replace(decoding, max_new_tokens=limit)
        ordered = [group for group in groups if limits[group[0]] == limit]
        ordered.sort(key=lambda group: -len(prompts[group[0]]))
        start = 0
        while start < len(ordered):
            width = len(prompts[ordered[start][0]]) + limit
            size = batch_size or max(1, capacity.sequences(width) // limited.num_beams)
            yield ordered[start : start + size], limited
            start += size


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    write: Callable[[str], None],
    decoding: Decoding,
    *,
    row: int = 0,
) -> str:
    """Continue ``prompt`` like ``generate_text``, and ``write`` the text as it is generated.

    Beam search passes its result in one piece at the end. ``row`` is the prompt's number. Returns
    the full text. Raises DataError for a prompt that is empty or too long.
    """
    if decoding.num_beams > 1:
        text = generate_text(model, tokenizer, [prompt], decoding)[0]
        write(text)
        return text
    (limit,) = prompt_limits(model, tokenizer, [prompt], decoding)
    decoding = replace(decoding, max_new_tokens=limit)
    reader = OutputReader(tokenizer, frozenset(eos_ids(model, tokenizer)), decoding.stop)
    ids, mask = left_pad([prompt], tokenizer, model.device)
    sample = sampler(decoding, [row], len(prompt), model.device)
    streamer = _TextStreamer(reader, write)
    generate: Any = model.generate
    with generation_mode(model):
        generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=generation_config(reader, max_new_tokens=limit),
            logits_processor=logits_processors(decoding, len(prompt), sample),
            stopping_criteria=StoppingCriteriaList([StopAtEnd(reader, len(prompt))]),
            streamer=streamer,
        )
    return streamer.written


class _TextStreamer(BaseStreamer):
    """Writes text as soon as no later token can change it: not incomplete characters, nor text that
    may be the beginning of a stop sequence."""

    def __init__(self, reader: OutputReader, write: Callable[[str], None]) -> None:
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
            text = text.rstrip(_REPLACEMENT_CHARACTER)
            text = text[: len(text) - _partial_stop(text, self._reader.stop)]
        self._write_up_to(text)

    def end(self) -> None:
        self._write_up_to(self._reader.read(self._ids or [])[0])

    def _write_up_to(self, text: str) -> None:
        if piece := text[len(self.written) :]:
            self._write(piece)
            self.written += piece


def _partial_stop(text: str, stop: tuple[str, ...]) -> int:
    """Return how many characters at the end of ``text`` may begin a stop sequence."""
    lengths = [k for mark in stop for k in range(1, len(mark)) if text.endswith(mark[:k])]
    return max(lengths, default=0)
