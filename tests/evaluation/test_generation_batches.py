"""A text is independent of the other rows of its batch and of their order."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.evaluation.generation import generate_text
from lorakit.evaluation.sampling import Decoding
from lorakit.models.load import load_pretrained
from lorakit.recipe.sections import ModelSection

TEXTS = [
    "a",
    "to be or not",
    "xyz" * 9,
    "a",
    "SELECT name FROM t",
    "!",
    "one two",
    "columns: 1",
    "b",
]
QUESTIONS = ["The capital of France is", "1, 2, 3,", "Name three colours: red,"]
WAYS = {
    "greedy": Decoding(12),
    "no repeats": Decoding(9, no_repeat_ngram_size=2),
    "sampled": Decoding(12, temperature=1.1, top_p=0.9, seed=3),
    "sampled with stop sequences": Decoding(12, temperature=1.0, seed=3, stop=("e", "or", " ")),
    "beams": Decoding(12, num_beams=4, length_penalty=0.9, no_repeat_ngram_size=4),
    "beams to a stop": Decoding(12, num_beams=3, length_penalty=0.8, stop=("e", "or", " ")),
}

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def small(tiny_llama: Path) -> Loaded:
    section = ModelSection(name_or_path=str(tiny_llama), dtype="float32")
    loaded = load_pretrained(section, "causal")
    with torch.no_grad():  # a random model is sure of nothing
        loaded.model.get_output_embeddings().weight.mul_(20)
    return loaded.model, loaded.tokenizer


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Loaded:
    section = ModelSection(name_or_path=str(smollm2), dtype="float32")
    loaded = load_pretrained(section, "causal")
    return loaded.model, loaded.tokenizer


def check(loaded: Loaded, texts: list[str], how: Decoding, sizes: tuple[int, ...]) -> list[str]:
    prompts = [loaded[1](text, add_special_tokens=False).input_ids for text in texts]
    wanted = generate_text(*loaded, prompts, how, batch_size=sizes[0])
    for size in sizes[1:]:
        assert generate_text(*loaded, prompts, how, batch_size=size) == wanted
    order = list(range(len(texts)))
    random.Random(1).shuffle(order)
    found = generate_text(
        *loaded, [prompts[i] for i in order], how, rows=order, batch_size=sizes[1]
    )
    assert found == [wanted[i] for i in order]
    return wanted


@pytest.mark.parametrize("way", WAYS)
def test_texts_are_independent_of_batches_and_order(small: Loaded, way: str) -> None:
    found = check(small, TEXTS, WAYS[way], sizes=(1, 3, 8))
    assert len(set(found)) > 4
    if WAYS[way].stop:
        assert any(len(text) < 12 for text in found)


@pytest.mark.parametrize(
    "how", [Decoding(5, temperature=1.0, top_p=0.9, seed=3), Decoding(5, num_beams=2)]
)
def test_texts_of_a_real_model_are_independent_of_batches(real: Loaded, how: Decoding) -> None:
    found = check(real, QUESTIONS, how, sizes=(1, 3))
    assert how.samples or "Paris" in found[0]
