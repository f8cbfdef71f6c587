"""What stands between a model's scores and the token that is taken.

Both processors know where a row's own text begins (``start``): what they do there depends on
nothing that stands before it, neither on padding nor on the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lorakit.evaluation.decoding import Decoding


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
