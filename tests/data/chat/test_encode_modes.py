"""What is trained with each ``train_on`` and each ``reasoning``, to the byte, for many templates."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorakit import registry
from lorakit.data.chat import encode_chat
from lorakit.data.examples import ChatExample
from lorakit.errors import DataError
from lorakit.evaluation.requests import chat_request
from tests.data.chat.agent_templates import AGENT_STYLES, agent_chat
from tests.data.chat.templates import STYLES, Style
from tests.data.chat.test_encode_rule import (
    CALL,
    LONG,
    TOOL,
    Messages,
    cases,
    decoded,
    stretches,
    with_template,
)

TASK = registry.task("chat")
ALL_STYLES = STYLES | AGENT_STYLES


@pytest.fixture(scope="module")
def base(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module", params=ALL_STYLES)
def styled(request: pytest.FixtureRequest, base: Any) -> tuple[Style, Any]:
    """A style of templates, and a tokenizer with its template."""
    style = ALL_STYLES[request.param]
    return style, with_template(copy.copy(base), style)


@pytest.fixture(scope="module")
def qwen3_like(base: Any) -> Any:
    return with_template(copy.copy(base), AGENT_STYLES["qwen3-like"])


def all_cases(style: Style) -> Iterator[tuple[str, Messages, tuple[Any, ...] | None]]:
    yield from cases(style)
    if style.tools and style.reasoning:
        yield "tools and reasoning", agent_chat(CALL), (TOOL,)
        yield "long", LONG["agent"][:13] + LONG["one with reasoning"][20:40], (TOOL,)


def example(messages: Messages, tools: Any, **keys: Any) -> ChatExample:
    row = {"messages": list(messages), "tools": list(tools or ())}
    built: ChatExample = TASK.example(row, TASK.Config(**keys))
    return built


def assistant_turns(messages: Messages) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_trained_text_follows_the_generation_prompt(
    styled: tuple[Style, Any], train_on: str
) -> None:
    style, tokenizer = styled
    for case, messages, tools in all_cases(style):
        rows = encode_chat(example(messages, tools, train_on=train_on), tokenizer).rows
        turns = [turn for row in rows for turn in row.turns]
        assert sorted(turns) == assistant_turns(messages)[-1 if train_on == "last" else 0 :]
        spans = [(row, span) for row in rows for span in stretches(row.loss_mask)]
        for (row, (begin, end)), turn in zip(spans, turns, strict=True):
            prompt = chat_request(messages[:turn], tokenizer, tools)
            assert row.input_ids[:begin] == prompt.input_ids, (case, turn)
            answer = decoded(tokenizer, row.input_ids[begin:end])
            assert answer == style.answer(messages[turn]), (case, turn)


def test_all_trains_every_token_of_the_rendered_chat(styled: tuple[Style, Any]) -> None:
    style, tokenizer = styled
    for case, messages, tools in all_cases(style):
        (row,) = encode_chat(example(messages, tools, train_on="all"), tokenizer).rows
        rendered = tokenizer.apply_chat_template(
            list(messages), tools=list(tools) if tools else None, tokenize=False
        )
        assert decoded(tokenizer, row.input_ids) == rendered, case
        assert all(row.loss_mask), case


def reasoning_of(message: dict[str, Any]) -> str:
    if "reasoning_content" in message:
        return str(message["reasoning_content"])
    found = re.search("<think>(.*)</think>", message.get("content") or "")
    return found.group(1) if found else ""


def shown_in_chat(messages: Messages, tools: Any, tokenizer: Any) -> list[str]:
    """The reasoning of the turns whose reasoning the template writes in the whole chat."""
    changed = [dict(message) for message in messages]
    for i, message in enumerate(changed):
        if thought := reasoning_of(message):
            key = "reasoning_content" if "reasoning_content" in message else "content"
            message[key] = message[key].replace(thought, f"QZXV{i}.")
    text = tokenizer.apply_chat_template(
        changed, tools=list(tools) if tools else None, tokenize=False
    )
    return [reasoning_of(m) for i, m in enumerate(messages) if f"QZXV{i}." in text]


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_masked_reasoning_is_all_that_is_not_trained(
    styled: tuple[Style, Any], train_on: str
) -> None:
    style, tokenizer = styled
    for case, messages, tools in all_cases(style):
        if not any(map(reasoning_of, messages)):
            continue
        train, mask = (
            encode_chat(example(messages, tools, train_on=train_on, reasoning=way), tokenizer)
            for way in ("train", "mask")
        )
        assert train.counts == mask.counts
        for plain, masked in zip(train.rows, mask.rows, strict=True):
            assert plain.input_ids == masked.input_ids
            pairs = [*zip(plain.loss_mask, masked.loss_mask, strict=True)]
            assert (False, True) not in pairs
            spans = stretches([before != after for before, after in pairs])
            answers = [(reasoning_of(messages[i]), style.answer(messages[i])) for i in plain.turns
                       if train_on != "all"]  # fmt: skip
            shown = [thought for thought, answer in answers if thought and thought in answer]
            if train_on == "all":
                shown = shown_in_chat(messages, tools, tokenizer)
            assert [decoded(tokenizer, masked.input_ids[a:b]) for a, b in spans] == shown, case


def test_dropped_reasoning_is_as_if_there_had_been_none(styled: tuple[Style, Any]) -> None:
    style, tokenizer = styled
    for case, messages, tools in all_cases(style):
        bare = tuple(
            {
                key: re.sub("<think>.*</think>", "", value) if key == "content" else value
                for key, value in message.items()
                if key != "reasoning_content"
            }
            for message in messages
        )
        for train_on in ("assistant", "all"):
            dropped = example(messages, tools, train_on=train_on, reasoning="drop")
            assert dropped == example(bare, tools, train_on=train_on), case
        found = encode_chat(example(messages, tools, reasoning="drop"), tokenizer)
        for row in found.rows:
            assert "7*13" not in decoded(tokenizer, row.input_ids), case


ASK = {"role": "user", "content": "91?"}


def trained_text(tokenizer: Any, answer: dict[str, Any], **keys: Any) -> str:
    (row,) = encode_chat(
        example((ASK, {"role": "assistant", **answer}), None, **keys), tokenizer
    ).rows
    return "".join(decoded(tokenizer, row.input_ids[a:b]) for a, b in stretches(row.loss_mask))


@pytest.mark.parametrize(
    ("answer", "trained"),
    [
        ({"content": "No."}, "<think>\n\n</think>\n\nNo.<|im_end|>"),
        ({"content": "No.", "reasoning_content": " \n"}, "<think>\n \n</think>\n\nNo.<|im_end|>"),
        ({"content": "No.", "reasoning": "7*13"}, "<think>\n\n</think>\n\nNo.<|im_end|>"),
        ({"content": "No.", "thinking": "\n7*13\n"}, "<think>\n\n</think>\n\nNo.<|im_end|>"),
        ({"content": "<think>\n7*13\n</think>\n\nNo."}, "<think>\n\n</think>\n\nNo.<|im_end|>"),
        ({"content": "7*13\n</think>\n\nNo."}, "<think>\n\n</think>\n\nNo.<|im_end|>"),
        ({"content": "Use <b> and </b>."}, "<think>\n\n</think>\n\nUse <b> and </b>.<|im_end|>"),
        ({"content": "<think>endless"}, "<think>\n\n</think>\n\n<think>endless<|im_end|>"),
        ({"content": "", "thinking": "7*13"}, "<think>\n\n</think>\n\n<|im_end|>"),
    ],
)
def test_masked_text(answer: dict[str, Any], trained: str, qwen3_like: Any) -> None:
    assert trained_text(qwen3_like, answer, reasoning="mask") == trained


def test_a_token_with_other_text_too_is_trained(base: Any) -> None:
    tokenizer = with_template(base, STYLES["chatml"])
    assert '>"' in tokenizer.tokenize('<think>"7"</think>No')
    trained = trained_text(tokenizer, {"content": '<think>"7"</think>No'}, reasoning="mask")
    assert trained == '<think>"</think>No<|im_end|>'


def test_a_mask_where_the_tokenizer_cannot_separate_prompt_and_answer(base: Any) -> None:
    tokenizer = with_template(base, STYLES["trailing_space"])
    answer = {"content": "<think>two words</think> No."}
    (plain, masked) = (trained_text(tokenizer, answer, reasoning=way) for way in ("train", "mask"))
    assert plain.replace("two words", "") == masked


def test_a_template_that_counts_the_reasoning_cannot_be_masked(base: Any) -> None:
    tokenizer = with_template(base, STYLES["chatml"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content | length }}{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(DataError, match=r"task.reasoning = mask: .*; allowed: train or drop"):
        trained_text(tokenizer, {"content": "<think>7*13</think>No."}, reasoning="mask")
