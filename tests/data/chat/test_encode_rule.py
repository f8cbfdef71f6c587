"""The trained text of each turn is, to the byte, what follows the prompt of generation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorakit.data.chat import encode_chat
from lorakit.data.examples import ChatExample
from lorakit.evaluation.requests import chat_request
from tests.data.chat.templates import STYLES, Style

Messages = tuple[dict[str, Any], ...]

TOOL = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "description": "The tide in a harbour",
        "parameters": {"type": "object", "properties": {"harbour": {"type": "string"}}},
    },
}
CALL = {"id": "c1", "type": "function",
        "function": {"name": "get_tide", "arguments": {"harbour": "Leith"}}}  # fmt: skip


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def reply(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Answer in one word."}
CHATS: dict[str, Messages] = {
    "one word": (user("Sort: whale"), reply("Ravel")),
    "several turns": (user("Name a colour"), reply("blue"), user("Another"), reply("red"),
                      user("One more."), reply("a")),
    "repeated": (user("a"), reply("a"), user("a"), reply("a")),
    "many bytes": (user("日本 🗼?"), reply("東京🗼 é"), user("ಠ"), reply("🚀🚀")),
    "spaces": (user(" x "), reply("  two spaces"), user("y\n"), reply("\nline\n\nline ")),
    "digits and marks": (user("7*6?"), reply("42."), user("9"), reply("...\n")),
    "names the end": (user("What ends a turn?"), reply("assistant: <user> [/INST] ### Response:")),
}  # fmt: skip
#: Not among the texts that the tokenizers below are trained on.
STEERING: dict[str, Messages] = {
    "no_think": (user("Colour? /no_think"), reply("blue"), user("Another"), reply("red")),
    "think in content": (user("91?"), reply("<think>7*13</think>No."), user("7?"), reply("Yes.")),
}
WITH_SYSTEM: dict[str, Messages] = {
    "system": (SYSTEM, user("Name a colour"), reply("blue")),
    "system, several turns": (SYSTEM, user("Name a colour"), reply("blue"), user("Another"),
                              reply("red")),
}  # fmt: skip
WITH_TOOLS: Messages = (
    user("When is high tide?"), {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "get_tide", "content": "14:05"},
    reply("At 14:05."), user("And then?"), reply("Let me look.", tool_calls=[CALL]),
    {"role": "tool", "tool_call_id": "c1", "name": "get_tide", "content": "02:30"},
    reply("At 02:30."),
)  # fmt: skip
WITH_REASONING: Messages = (
    user("Is 91 prime?"), reply("No.", reasoning_content="91 = 7 * 13"), user("Is 7?"),
    reply("Yes.", reasoning_content="It has no divisors."),
)  # fmt: skip


def cases(style: Style) -> Iterator[tuple[str, Messages, tuple[Any, ...] | None]]:
    yield from ((name, chat, None) for name, chat in (CHATS | STEERING).items())
    if style.system:
        yield from ((name, chat, None) for name, chat in WITH_SYSTEM.items())
    if style.tools:
        yield "tools", WITH_TOOLS, (TOOL,)
    if style.reasoning:
        yield "reasoning", WITH_REASONING, None


def sentencepiece(prepend: bool) -> PreTrainedTokenizerFast:
    """A SentencePiece tokenizer like Llama 2's, with a marker for word starts. With ``prepend`` the
    marker is added before every part between special tokens, else only at the start."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if prepend:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    alphabet = sorted(
        {character for text in _texts() for character in text if ord(character) < 128}
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "<|im_end|>", "<|im_start|>",
                        *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=["▁", *alphabet],
    )  # fmt: skip
    backend.train_from_iterator([" ".join(_texts()), *_texts()] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip


def _texts() -> list[str]:
    chats = [*CHATS.values(), *WITH_SYSTEM.values(), WITH_TOOLS, WITH_REASONING]
    roles = ["user assistant system model tool <|| > [INST] [/INST] {}: \n ASSISTANT: Human: "]
    return roles + [m["content"] for chat in chats for m in chat if m.get("content")]


@pytest.fixture(scope="module", params=["bytes", "first", "always"])
def base(request: pytest.FixtureRequest, smollm2: Path) -> Any:
    if request.param == "bytes":
        return AutoTokenizer.from_pretrained(smollm2)
    return sentencepiece(prepend=request.param == "always")


def with_template(tokenizer: Any, style: Style) -> Any:
    if style.special:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": list(style.special)},
                                     replace_extra_special_tokens=False)  # fmt: skip
    tokenizer.chat_template = style.template
    return tokenizer


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False,
                                clean_up_tokenization_spaces=False))  # fmt: skip


def stretches(trained: Sequence[bool]) -> list[tuple[int, int]]:
    """The spans of trained tokens."""
    flags = [False, *trained, False]
    changes = [i for i in range(len(flags) - 1) if flags[i] != flags[i + 1]]
    return list(zip(changes[::2], changes[1::2], strict=True))


@pytest.mark.parametrize("name", STYLES)
def test_trained_text_is_what_generation_must_produce(name: str, base: Any) -> None:
    style = STYLES[name]
    tokenizer = with_template(base, style)
    lossy = decoded(tokenizer, tokenizer("<|im_end|>a").input_ids) != "<|im_end|>a"
    for case, messages, tools in cases(style):
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        encoded = encode_chat(ChatExample(messages, None, tools), tokenizer)
        assert not encoded.counts["straddling_answers"], case
        found = [(row, span) for row in encoded.rows for span in stretches(row.loss_mask)]
        trained = [turn for row in encoded.rows for turn in row.turns]
        assert sorted(trained) == turns, case
        for (row, (begin, end)), turn in zip(found, trained, strict=True):
            prompt = chat_request(messages[:turn], tokenizer, tools)
            assert row.input_ids[:begin] == prompt.input_ids, (case, turn)
            whole, before = (
                decoded(tokenizer, row.input_ids[:end]),
                decoded(tokenizer, prompt.input_ids),
            )
            assert whole.startswith(before), (case, turn)
            answer = style.answer(messages[turn])
            if lossy:  # it writes spaces of its own wherever a special token ends
                (joint,) = tokenizer([prompt.text + answer], add_special_tokens=False).input_ids
                assert whole == decoded(tokenizer, joint), (case, turn)
            else:
                assert whole[len(before) :] == answer, (case, turn)
        if len(turns) > 1 and "system" in case and style.splits and tokenizer.vocab_size > 1000:
            assert len(encoded.rows) == len(turns), case


def long_chat(turns: int, **keys: Any) -> Messages:
    words = ["a", "blue", "two words", "日本", "  spaced ", "assistant", "Name: x\n"]
    return tuple(
        message
        for i in range(turns)
        for message in (user(f"Question {i}: {words[i % 5]}?"), reply(words[i % 7], **keys))
    )


def agent_chat(turns: int) -> Messages:
    """Return a question, tool calls and the answer."""
    steps = [
        message
        for i in range(turns)
        for message in (
            {"role": "assistant", "tool_calls": [CALL], "reasoning_content": f"Step {i}."},
            {"role": "tool", "tool_call_id": "c1", "name": "get_tide", "content": f"{i}:00"},
        )
    ]
    return (user("When is high tide?"), *steps, reply("At noon."))


LONG: dict[str, Messages] = {
    "plain": long_chat(25),
    "system": (SYSTEM, *long_chat(25)),
    "reasoning": long_chat(20, reasoning_content="So be it."),
    "one with reasoning": (*long_chat(14), *WITH_REASONING, *long_chat(8)),
    "asks for something once": (*long_chat(2), user("A colour? /no_think"), reply("blue"),
                                *long_chat(25)),
    "asks for something at times": (*long_chat(8), user("A colour? /no_think"), reply("blue"),
                                    *long_chat(8), user("/no_think Red?"), reply("No.")) * 2,
    "think in content": (*long_chat(9), user("91?"), reply("<think>7*13</think>No."),
                         *long_chat(14)),
    "agent": agent_chat(25),
    "agent, asked again": (*agent_chat(15), *agent_chat(15)),
}  # fmt: skip


class Counting:
    """The number of messages that a tokenizer's template rendered."""

    def __init__(self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.utils import chat_template_utils

        self.messages = 0
        render = chat_template_utils.render_jinja_template

        def counted(conversations: Any, *arguments: Any, **keys: Any) -> Any:
            self.messages += sum(map(len, conversations))
            return render(conversations, *arguments, **keys)

        monkeypatch.setattr(chat_template_utils, "render_jinja_template", counted)
        module = "transformers.tokenization_utils_base.render_jinja_template"
        monkeypatch.setattr(module, counted)


@pytest.fixture(scope="module")
def bytes_tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.parametrize("name", STYLES)
def test_long_chats_equal_their_turns_one_by_one(
    name: str, bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    style = STYLES[name]
    tokenizer = with_template(bytes_tokenizer, style)
    rendered = Counting(tokenizer, monkeypatch)
    for case, messages in LONG.items():
        takes = style.system if case == "system" else style.tools if "agent" in case else True
        if not takes:
            continue
        example = ChatExample(messages, None, (TOOL,) if "agent" in case else None)
        rendered.messages = 0
        found = encode_chat(example, tokenizer)
        if len(found.rows) == 1 or case in {"plain", "system", "reasoning"}:
            most = 15 if len(found.rows) == 1 else 25
            assert rendered.messages < most * len(messages), case
        with monkeypatch.context() as patch:
            patch.setattr("lorakit.data.chat.long_chat.EXACT_COST", 10**6)
            rendered.messages = 0
            wanted = encode_chat(example, tokenizer)
            assert rendered.messages > 18 * len(messages), case
        assert found == wanted, case
        for row in found.rows[-5:]:
            spans = stretches(row.loss_mask)
            for turn, (begin, _) in list(zip(row.turns, spans, strict=True))[::6]:
                prompt = chat_request(messages[:turn], tokenizer, example.tools)
                assert row.input_ids[:begin] == prompt.input_ids, (case, turn)


def test_a_chat_of_300_messages_costs_few_renderings(
    bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_template(bytes_tokenizer, STYLES["chatml"])
    rendered = Counting(tokenizer, monkeypatch)
    messages = long_chat(150)
    (row,) = encode_chat(
        ChatExample(tuple({**m, "content": m["content"].strip()} for m in messages)), tokenizer
    ).rows
    assert len(stretches(row.loss_mask)) == 150
    assert rendered.messages < 8 * len(messages)


@pytest.mark.parametrize("name", ["qwen3", "mistral3", "opens_thinking"])
def test_a_split_chat_of_300_messages_costs_fewer_than_20_renderings(
    name: str, bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_template(bytes_tokenizer, STYLES[name])
    rendered = Counting(tokenizer, monkeypatch)
    messages = (SYSTEM, *long_chat(150))
    rows = encode_chat(ChatExample(messages), tokenizer).rows
    assert rendered.messages < 20 * len(messages)
    assert len(rows) == 150
    for row in (rows[0], rows[70], rows[-1]):
        prompt = chat_request(messages[: row.turns[0]], tokenizer, None)
        assert row.input_ids[: row.loss_mask.index(True)] == prompt.input_ids
