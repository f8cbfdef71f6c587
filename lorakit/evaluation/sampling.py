"""How the tokens of a continuation are chosen. No tensor library is loaded here.

Where a continuation ends: at an EOS token, or before a stop text.

What stands between a model's scores and the token that is taken.

Both processors know where a row's own text begins (``start``): what they do there depends on
nothing that stands before it, neither on padding nor on the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from lorakit.tasks.base import GenerationSection


@dataclass(frozen=True)
class Decoding:
    """One way to continue a prompt, at most ``max_new_tokens`` long.

    ``num_beams`` 1 takes a token at a time: the likeliest, or with ``temperature`` above 0 one
    that is drawn from softmax(logits / temperature), among the likeliest whose probabilities add
    up to ``top_p``. What is drawn is a function of ``seed``, the row's number and the position.
    More beams search, and the continuation of the greatest sum of log probabilities / length **
    ``length_penalty`` is taken; ``lorakit.evaluation.generation`` says how. No
    ``no_repeat_ngram_size`` tokens occur twice in a continuation (0: they may). It ends before the
    first text of ``stop`` behind its first visible character. With ``fit_window`` a prompt
    that leaves fewer than ``max_new_tokens`` of the model's window
    gets as many as it leaves; else it is an error.
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
        assert self.num_beams == 1 or self.temperature == 0, "a search draws nothing"
        assert all(self.stop), "an empty text stands everywhere"

    @property
    def draws(self) -> bool:
        return self.temperature > 0


def task_decoding(config: GenerationSection, stop: tuple[str, ...], seed: int) -> Decoding:
    """What a recipe's ``task`` section and the task's own stop texts say."""
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


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a text for the tokenizer or the model's generation config."""
    return stop_ids(tokenizer, getattr(model.generation_config, "eos_token_id", None))


def stop_ids(tokenizer: PreTrainedTokenizerBase, configured: int | list[int] | None) -> list[int]:
    """Return the tokenizer's EOS id and the ``configured`` ones of a checkpoint."""
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return sorted({int(i) for i in ids if i is not None})


def before_stop(text: str, stop: Iterable[str]) -> tuple[str, bool]:
    """The text before the one of ``stop`` that is first complete behind the text's first visible
    character, and whether there is one. A text that grows is cut at the same place at any size."""
    start = len(text) - len(text.lstrip())
    places = [(place + len(mark), place) for mark in stop if (place := text.find(mark, start)) >= 0]
    return (text[: min(places)[1]], True) if places else (text, False)


@dataclass(frozen=True)
class Reader:
    """Generated ids -> text, up to its end."""

    tokenizer: PreTrainedTokenizerBase
    eos: frozenset[int]
    stop: tuple[str, ...]

    def read(self, ids: list[int]) -> tuple[str, bool]:
        """The text so far without special tokens, and whether it has come to its end."""
        end = next((i for i, token in enumerate(ids) if token in self.eos), None)
        text = str(self.tokenizer.decode(
            ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        ))  # fmt: skip
        text, stopped = before_stop(text, self.stop)
        return text, end is not None or stopped


class Ended(StoppingCriteria):
    """Row by row whether the text from ``start`` on has ended; ``check`` is called at each token.

    transformers' own ``stop_strings`` end a text that begins with one, and one that only overlaps
    the prompt's end; here a stop text counts behind the first visible character.
    """

    def __init__(
        self, reader: Reader, start: int, check: Callable[[], None] = lambda: None
    ) -> None:
        self.reader = reader
        self.start = start
        self.check = check

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.check()
        rows = len(input_ids)
        if not self.reader.stop:  # transformers looks for the EOS itself
            return torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        ended = [self.reader.read(row)[1] for row in input_ids[:, self.start :].tolist()]
        return torch.tensor(ended, device=input_ids.device)


class NoRepeatedNgrams(LogitsProcessor):
    """No ``size`` tokens occur twice in the generated text; what is left is normalised anew.

    Unlike transformers' own, and like the LoRA authors' ``gpt2_beam.py``, the prompt's n-grams do
    not count: a name of four tokens may be taken over from it. As there, a token is barred before
    the softmax, so that the rest of the distribution adds up to one.
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


class Draw(LogitsProcessor):
    """Leaves one token of each row: the one that the row's own random number falls on.

    ``numbers`` (rows, tokens) are uniform in [0, 1). The token is the first in the vocabulary's
    order up to which the kept probabilities add up to more than the number's share of them all,
    so a rounding error of the scores moves a result only where a number lies that close to a
    border.
    """

    def __init__(self, temperature: float, top_p: float, numbers: Tensor, start: int) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self.numbers = numbers
        self.start = start

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.numbers = self.numbers[rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        number = self.numbers[:, input_ids.shape[1] - self.start]
        above = scores.to(self.numbers.dtype)
        kept = ((above - above.amax(dim=-1, keepdim=True)) / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            ordered, places = kept.sort(dim=-1, descending=True, stable=True)
            outside = ordered.cumsum(dim=-1) - ordered >= self.top_p
            kept = kept.masked_fill(torch.zeros_like(outside).scatter_(1, places, outside), 0)
        sums = kept.cumsum(dim=-1)
        token = torch.searchsorted(sums, number.unsqueeze(1) * sums[:, -1:], right=True)
        token = token.clamp_max(scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(1, token, 0.0)


def uniform_numbers(seed: int, rows: Sequence[int], positions: int, device: torch.device) -> Tensor:
    """(rows, positions) numbers in [0, 1), those of row r from numpy's generator of (seed, r)."""
    drawn = np.stack([np.random.default_rng((seed, row)).random(positions) for row in rows])
    # Apple's devices have no float64.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.from_numpy(drawn).to(device, dtype)


def processors(decoding: Decoding, start: int, draw: Draw | None = None) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if decoding.no_repeat_ngram_size:
        found.append(NoRepeatedNgrams(decoding.no_repeat_ngram_size, start))
    if draw is not None:
        found.append(draw)
    return found
