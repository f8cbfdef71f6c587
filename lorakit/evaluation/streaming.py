"""One continuation, handed out as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lorakit.evaluation.generation import check_prompts, generating, generation_config


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    write: Callable[[str], None],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> str:
    """Continue ``prompt`` as ``generate_text`` does; ``write`` gets the text piece by piece, cut
    between words. Returns the whole. Raises DataError for a prompt that is empty or too long."""
    check_prompts(model, [prompt], max_new_tokens)
    config = generation_config(model, tokenizer, temperature, top_p, max_new_tokens=max_new_tokens)
    streamer = _Pieces(tokenizer, write)
    ids = torch.tensor([list(prompt)], device=model.device)
    generate: Any = model.generate
    with generating(model):
        generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=streamer,
        )
    return "".join(streamer.pieces)


class _Pieces(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self.pieces: list[str] = []
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self._write(text)
