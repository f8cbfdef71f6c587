"""Tiny models with tokenizers that llama.cpp has too."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

from tests.families import randomized, tiny

VOCABULARY = 300
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
_TEXTS = ["the cat sat on the mat, the dog ran to the store"] * 20 + [
    "it's 1234 o'clock\n\nthen"
] * 9
#: What a tokenizer's steps before BPE are.
STEPS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)],
    "qwen2": [
        pre_tokenizers.Split(Regex(QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "unknown": [
        pre_tokenizers.Split(Regex(r"\d+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


@cache
def byte_level(steps: str = "gpt-2") -> Tokenizer:
    """A byte-level BPE of 290 tokens, trained on a few texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(STEPS[steps])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288, special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.add_tokens(
        [AddedToken("<tool>", normalized=False), AddedToken("<|pad|>", special=True)]
    )
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer, **more: Any) -> None:
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>", **more}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)
    fast.save_pretrained(folder)


def write_base(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, steps: str = "gpt-2", **more: Any
) -> Path:
    """Write a model of ``family`` with random weights, norms and biases too, and its tokenizer."""
    model = randomized(tiny(family, **{"vocab_size": VOCABULARY, **more}))
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder, byte_level(steps))
    return folder
