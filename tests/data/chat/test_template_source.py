"""The chat templates that lorakit has, each on a chat of two exchanges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorakit.data.chat import encode_chat, encode_chat_prompt
from lorakit.data.chat.template_source import find_template
from lorakit.data.examples import ChatExample
from lorakit.models.vocabulary import extend_tokenizer
from lorakit.recipe.sections import ModelSection
from lorakit.recipe.vocabulary import CHAT_TEMPLATES

MESSAGES = [
    {"role": "system", "content": "S."},
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "A."},
    {"role": "user", "content": "b?"},
    {"role": "assistant", "content": "B."},
]
#: The chat as the models with these templates see it, with <s> as BOS and </s> as EOS.
TEXTS = {
    "alpaca": "S.\n\n### Instruction:\na?\n\n### Response:\nA.</s>\n\n### Instruction:\nb?\n\n### Response:\nB.</s>\n\n",
    "chatml": "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n",
    "gemma": "<s><start_of_turn>user\nS.\n\na?<end_of_turn>\n<start_of_turn>model\nA.<end_of_turn>\n<start_of_turn>user\nb?<end_of_turn>\n<start_of_turn>model\nB.<end_of_turn>\n",
    "llama-2": "<s>[INST] <<SYS>>\nS.\n<</SYS>>\n\na? [/INST] A. </s><s>[INST] b? [/INST] B. </s>",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nS.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\na?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nb?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB.<|eot_id|>",
    "mistral": "<s>[INST] S.\n\na? [/INST] A.</s>[INST] b? [/INST] B.</s>",
    "vicuna": "<s>S. USER: a? ASSISTANT: A.</s>USER: b? ASSISTANT: B.</s>",
    "zephyr": "<|system|>\nS.</s>\n<|user|>\na?</s>\n<|assistant|>\nA.</s>\n<|user|>\nb?</s>\n<|assistant|>\nB.</s>\n",
}  # fmt: skip
ENDS = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama-3": "<|eot_id|>"}


def tokenizer_with(template: str, base: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    extend_tokenizer(tokenizer, ModelSection(name_or_path="m", chat_template=template))
    return tokenizer


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_text(name: str, tiny_llama: Path) -> None:
    tokenizer = tokenizer_with(name, tiny_llama)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == TEXTS[name]
    ids = tokenizer.convert_tokens_to_ids(list(find_template(name).tokens))
    assert ids == list(range(258, 258 + len(ids)))
    assert tokenizer.eos_token == ENDS.get(name, "</s>")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_what_is_trained_follows_the_prompt_of_generation(name: str, tiny_llama: Path) -> None:
    """Both answers with the token that ends them, and nothing else."""
    tokenizer = tokenizer_with(name, tiny_llama)
    trained = tuple(message["role"] == "assistant" for message in MESSAGES)
    [row] = encode_chat(ChatExample(tuple(MESSAGES), trained), tokenizer).rows
    spans = "".join(
        tokenizer.decode([token]) if counts else "\0"
        for token, counts in zip(row.input_ids, row.loss_mask, strict=True)
    )
    end = f"{' ' if name == 'llama-2' else ''}{ENDS.get(name, '</s>')}"
    answers = [piece.strip() for piece in spans.split("\0") if piece]
    assert answers == [f"A.{end}", f"B.{end}"]
    prompt = encode_chat_prompt(MESSAGES[:-1], tokenizer)
    assert row.input_ids[: len(prompt)] == prompt
    assert row.loss_mask[len(prompt)]


def test_a_file_needs_its_special_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(
        "{% for m in messages %}<|{{ m['role'] }}|>{{ '<|turn|>' + m['content'] }}<|end of|>"
        "<|end|>{% endfor %}{# <|turn|> #}"
    )
    assert find_template(str(file)).tokens == ("<|turn|>", "<|end|>")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    section = ModelSection(name_or_path="m", chat_template=str(file), add_tokens=["<|turn|>", "a"])
    found = extend_tokenizer(tokenizer, section)
    known = tokenizer.convert_tokens_to_ids("a")
    assert found.trained == (known, 258, 259)
    assert tokenizer("a<|turn|>").input_ids == [known, 258]
    assert any("trained too: a" in note for note in found.notes)
