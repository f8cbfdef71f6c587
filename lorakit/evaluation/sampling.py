"""Choose the tokens of a continuation, and find its end: sampling, n-grams, EOS, stop sequences.

The logits processors get the position at which continuations start (``start``) and consider only
tokens after it, so padding and the other rows of the batch have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from lorakit.tasks.base import GenerationSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # slow to import, and not needed for a preview


@dataclass(frozen=True)
class Decoding:
    """How to continue a prompt by at most ``max_new_tokens`` tokens.

    With ``num_beams`` 1, tokens are chosen one at a time: the most likely one, or with
    ``temperature`` above 0 one sampled from softmax(logits / temperature), restricted to the most
    likely tokens whose probabilities add up to ``top_p``. The random numbers depend only on
    ``seed``, the row's number and the position. With more beams, beam search maximizes the sum of
    log probabilities / length ** ``length_penalty`` (see ``lorakit.evaluation.generation``).

    No n-gram of ``no_repeat_ngram_size`` tokens occurs twice in a continuation (0: no limit). It
    ends before the first sequence of ``stop`` after its first visible character. If a prompt leaves
    fewer than ``max_new_tokens`` of the model's window, the continuation is shortened with
    ``fit_window``; otherwise that is an error.
    """

    max_new_tokens: int
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    fit_window: bool = False

    def __post_init__(self) -> None:
        assert self.max_new_tokens > 0
        assert self.num_beams > 0
        assert self.no_repeat_ngram_size >= 0
        assert self.temperature >= 0
        assert 0 < self.top_p <= 1
        assert self.num_beams == 1 or self.temperature == 0, "beam search does not sample"
        assert all(self.stop), "an empty stop sequence matches everywhere"

    @property
    def samples(self) -> bool:
        return self.temperature > 0


def task_decoding(config: GenerationSection, stop: tuple[str, ...], seed: int) -> Decoding:
    """Return the decoding that a recipe's ``task`` section describes, with the task's ``stop``."""
    return Decoding(
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
        length_penalty=config.length_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        temperature=config.temperature,
        top_p=config.top_p,
        stop=stop,
        seed=seed,
    )


# Where a continuation ends


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a text for the tokenizer or the model's generation config."""
    return stop_ids(tokenizer, getattr(model.generation_config, "eos_token_id", None))


def stop_ids(tokenizer: PreTrainedTokenizerBase, configured: int | list[int] | None) -> list[int]:
    """Return the tokenizer's EOS id and the ``configured`` ones of a checkpoint."""
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return sorted({int(i) for i in ids if i is not None})


def before_stop(text: str, stop: Iterable[str]) -> tuple[str, bool]:
    """Return ``text`` up to its first stop sequence, and whether it has one.

    Stop sequences count after the first visible character, and the first is the one that is
    complete first, so a growing text is always cut at the same place.
    """
    start = len(text) - len(text.lstrip())
    found = [(at + len(mark), at) for mark in stop if (at := text.find(mark, start)) >= 0]
    return (text[: min(found)[1]], True) if found else (text, False)


@dataclass(frozen=True)
class OutputReader:
    """Decodes generated ids up to the end of the text."""

    tokenizer: PreTrainedTokenizerBase
    eos: frozenset[int]
    stop: tuple[str, ...]

    def read(self, ids: list[int]) -> tuple[str, bool]:
        """Return the text so far without special tokens, and whether it has ended."""
        end = next((i for i, token in enumerate(ids) if token in self.eos), None)
        text = str(self.tokenizer.decode(
            ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        ))  # fmt: skip
        text, stopped = before_stop(text, self.stop)
        return text, end is not None or stopped


class StopAtEnd(StoppingCriteria):
    """Stops each row where its text from ``start`` on ends; calls ``check`` at every token.

    The ``stop_strings`` of transformers also match at the very beginning of a text, and match
    strings that begin in the prompt.
    """

    def __init__(
        self, reader: OutputReader, start: int, check: Callable[[], None] = lambda: None
    ) -> None:
        self.reader = reader
        self.start = start
        self.check = check

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.check()
        rows = len(input_ids)
        if not self.reader.stop:  # transformers handles EOS itself
            return torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        ended = [self.reader.read(row)[1] for row in input_ids[:, self.start :].tolist()]
        return torch.tensor(ended, device=input_ids.device)


# Which token comes next


class NoRepeatNgrams(LogitsProcessor):
    """Keeps any ``size`` tokens from occurring twice in a continuation.

    Unlike in transformers, and as in the LoRA authors' ``gpt2_beam.py``, n-grams of the prompt do
    not count, so a name of four tokens can be copied from it; and a token is excluded before the
    softmax, so the remaining probabilities add up to one.
    """

    def __init__(self, size: int, start: int) -> None:
        self.size = size
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        made = input_ids[:, self.start :]
        if made.shape[1] < self.size:
            return scores
        ngrams = made.unfold(1, self.size, 1)
        last = made[:, made.shape[1] - self.size + 1 :]
        same = (ngrams[..., :-1] == last.unsqueeze(1)).all(dim=-1)
        hits = torch.zeros_like(scores).scatter_add_(1, ngrams[..., -1], same.to(scores.dtype))
        return scores.masked_fill(hits > 0, -math.inf).log_softmax(dim=-1)


class SampleToken(LogitsProcessor):
    """Masks all tokens of each row except the one that the row's random number samples.

    ``numbers`` (rows, positions) are uniform in [0, 1). The token is the first, in the order of the
    vocabulary, at which the cumulative probability exceeds number * total (inverse transform
    sampling). A rounding error of the scores changes a result only if a number is that close to a
    boundary.
    """

    def __init__(self, temperature: float, top_p: float, numbers: Tensor, start: int) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self.numbers = numbers
        self.start = start

    def keep_rows(self, rows: Tensor) -> None:
        """Continue with these rows only."""
        self.numbers = self.numbers[rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        number = self.numbers[:, input_ids.shape[1] - self.start]
        logits = scores.to(self.numbers.dtype)
        kept = ((logits - logits.amax(dim=-1, keepdim=True)) / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            ordered, tokens = kept.sort(dim=-1, descending=True, stable=True)
            outside = _cumulative(ordered) - ordered >= self.top_p
            kept = kept.masked_fill(torch.zeros_like(outside).scatter_(1, tokens, outside), 0)
        sums = _cumulative(kept)
        token = torch.searchsorted(sums, number.unsqueeze(1) * sums[:, -1:], right=True)
        token = token.clamp_max(scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(1, token, 0.0)


def _cumulative(values: Tensor) -> Tensor:
    """The sums along the last dimension; CUDA has no deterministic kernel for them."""
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(dim=-1).to(values.device)
    return values.cumsum(dim=-1)


def uniform_numbers(seed: int, rows: Sequence[int], positions: int, device: torch.device) -> Tensor:
    """Return (rows, positions) numbers in [0, 1), with numpy's generator seeded by (seed, row)."""
    numbers = np.stack([np.random.default_rng((seed, row)).random(positions) for row in rows])
    # Apple's devices have no float64.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.from_numpy(numbers).to(device, dtype)


def sampler(
    decoding: Decoding, rows: Sequence[int], start: int, device: torch.device
) -> SampleToken | None:
    """Return the processor that samples tokens for prompts numbered ``rows``; None if greedy."""
    if not decoding.samples:
        return None
    numbers = uniform_numbers(decoding.seed, rows, decoding.max_new_tokens, device)
    return SampleToken(decoding.temperature, decoding.top_p, numbers, start)


def logits_processors(
    decoding: Decoding, start: int, sample: SampleToken | None = None
) -> LogitsProcessorList:
    """Return the processors in the order in which they apply."""
    found = LogitsProcessorList()
    if decoding.no_repeat_ngram_size:
        found.append(NoRepeatNgrams(decoding.no_repeat_ngram_size, start))
    if sample is not None:
        found.append(sample)
    return found
