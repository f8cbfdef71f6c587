from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorakit.data.chat import encode_chat, encode_chat_prompt
from lorakit.data.encode import encode_split
from lorakit.data.examples import ChatExample
from lorakit.data.sources import Split
from lorakit.errors import DataError

CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "4"},
    {"role": "assistant", "content": "Yes, 4 é"},
)
#: Spaces around the assistant's words, as Llama 2 has them, and EOS behind.
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }} </s>"
    "{% else %}[{{ m['content'] | trim }}]{% endif %}{% endfor %}"
)
WITHOUT_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
FORGETS = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}</s>"
    "{% endif %}{% endfor %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}</s>{% endfor %}"
)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def trained_parts(messages: tuple[dict[str, str], ...], tokenizer: Any) -> list[str]:
    """The trained stretches of the chat, each decoded by itself."""
    ids, trained = encode_chat(ChatExample(messages), tokenizer)
    parts: list[list[int]] = []
    for index, (token, on) in enumerate(zip(ids, trained, strict=True)):
        if on and (index == 0 or not trained[index - 1]):
            parts.append([])
        if on:
            parts[-1].append(token)
    return [tokenizer.decode(part) for part in parts]


def test_assistant_turns_and_their_ends_are_trained(tokenizer: Any) -> None:
    assert trained_parts(CHAT, tokenizer) == ["4</s>", "Yes, 4 é</s>"]
    ids, _ = encode_chat(ChatExample(CHAT), tokenizer)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(list(CHAT), tokenize=False)


def test_eos_behind_white_space_is_trained(tokenizer: Any) -> None:
    tokenizer.chat_template = SPACED
    assert trained_parts(CHAT, tokenizer) == ["4 </s>", "Yes, 4 é </s>"]


def test_template_without_an_end_trains_the_words_alone(tokenizer: Any) -> None:
    tokenizer.chat_template = WITHOUT_END
    assert trained_parts(CHAT, tokenizer) == ["4", "Yes, 4 é"]


def test_turn_that_another_repeats_is_told_apart(tokenizer: Any) -> None:
    chat = (
        {"role": "user", "content": "<assistant>a</s>"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "a"},
    )
    assert trained_parts(chat, tokenizer) == ["a</s>", "a</s>"]
    ids, trained = encode_chat(ChatExample(chat), tokenizer)
    text = tokenizer.decode([i for i, on in zip(ids, trained, strict=True) if not on])
    assert text == "<user><assistant>a</s></s><assistant><user>a</s><assistant>"


def test_prompt_is_what_stands_before_the_turn_in_training(tokenizer: Any) -> None:
    ids, trained = encode_chat(ChatExample(CHAT), tokenizer)
    before = ids[: trained.index(True)]
    assert encode_chat_prompt(list(CHAT[:2]), tokenizer) == before


def test_template_that_rewrites_the_rest_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="message 3: the chat template renders the rest"):
        encode_chat(ChatExample(CHAT), tokenizer)
    tokenizer.chat_template = FORGETS
    with pytest.raises(DataError, match="message 3"):
        encode_chat(ChatExample(CHAT), tokenizer)


def test_refusals_name_the_row(tokenizer: Any) -> None:
    tokenizer.chat_template = ALTERNATES
    rows = [{"chat": CHAT[1:3]}, {"chat": CHAT}]
    split = Split("train", rows, "chats.jsonl", "0")
    message = r"chats\.jsonl, row 2: the chat template refuses the messages: roles must alternate"
    with pytest.raises(DataError, match=message):
        encode_split(split, lambda row: ChatExample(row["chat"]), tokenizer, 100)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        encode_split(split, lambda row: ChatExample(row["chat"]), tokenizer, 100)


def test_long_chats_lose_their_end(tokenizer: Any) -> None:
    split = Split("train", [{}, {}], "chats.jsonl", "0")
    short = encode_split(split, lambda _: ChatExample(CHAT), tokenizer, 60)
    whole, _ = encode_chat(ChatExample(CHAT), tokenizer)
    assert short[0].input_ids.tolist() == whole[:60]
    assert (short.truncated_rows, short.cut_completions) == (2, 2)
    with pytest.raises(DataError, match=r"row 1: no token to train on within task.max_length = 20"):
        encode_split(split, lambda _: ChatExample(CHAT), tokenizer, 20)


def test_smollm2s_own_template(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert trained_parts(CHAT, tokenizer) == ["4<|im_end|>", "Yes, 4 é<|im_end|>"]
    assert trained_parts(CHAT[1:], tokenizer) == ["4<|im_end|>", "Yes, 4 é<|im_end|>"]
