"""One continuation, handed out as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lorakit.evaluation.choosing import Draw, processors, uniform_numbers
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.ending import Ended, Reader, eos_ids
from lorakit.evaluation.generation import generate_text
from lorakit.evaluation.prepare import generating, generation_config, left_padded, prompt_limits

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
