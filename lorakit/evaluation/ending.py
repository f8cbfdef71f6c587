"""Where a continuation ends: at an EOS token, or before a stop text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a text, for the tokenizer or for the checkpoint."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
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
