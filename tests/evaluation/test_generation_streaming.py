from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.errors import DataError
from lorakit.evaluation.generation import generate_text, stream_text
from lorakit.evaluation.sampling import Decoding
from lorakit.models.load import load_pretrained
from lorakit.recipe.sections import ModelSection

PROMPT = [90, 70, 80, 100, 110]


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    section = ModelSection(name_or_path=str(tiny_llama), dtype="float32")
    loaded = load_pretrained(section, "causal")
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.mul_(20)
    return loaded.model, loaded.tokenizer


def streamed(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], how: Decoding, row: int = 0
) -> tuple[str, list[str]]:
    pieces: list[str] = []
    return stream_text(*loaded, PROMPT, pieces.append, how, row=row), pieces


@pytest.mark.parametrize(
    "how",
    [
        Decoding(20),
        Decoding(20, no_repeat_ngram_size=1),
        Decoding(20, temperature=0.9, top_p=0.95, seed=4),
        Decoding(20, num_beams=3),
    ],
)
def test_pieces_add_up_to_the_batch_result(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], how: Decoding
) -> None:
    text, pieces = streamed(loaded, how)
    assert [text] == generate_text(*loaded, [PROMPT], how)
    assert "".join(pieces) == text
    assert (len(pieces) == 1) == (how.num_beams > 1)


def test_no_part_of_a_stop_sequence_is_written(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    whole, _ = streamed(loaded, Decoding(12, no_repeat_ngram_size=1))
    for start, length in ((1, 1), (2, 3), (4, 4)):
        mark = whole[start : start + length]
        how = Decoding(12, no_repeat_ngram_size=1, stop=(mark, "never there"))
        text, pieces = streamed(loaded, how)
        assert [text] == generate_text(*loaded, [PROMPT], how)
        assert "".join(pieces) == text == whole[: whole.index(mark, 1)]


def test_sampling_depends_on_the_row(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    how = Decoding(20, temperature=1.5, seed=1)
    assert streamed(loaded, how, row=5)[0] == generate_text(*loaded, [PROMPT], how, rows=[5])[0]
    assert streamed(loaded, how, row=5) != streamed(loaded, how, row=6)


def test_a_prompt_without_room(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    with pytest.raises(DataError, match="window"):
        stream_text(*loaded, [5] * 240, lambda piece: None, Decoding(20))
