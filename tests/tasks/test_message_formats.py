"""Chats as they come in datasets: JSON texts, lists as prompts, keys and roles of many kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorakit import registry
from lorakit.data.chat import chat_prompt_text
from lorakit.errors import DataError

Row = dict[str, Any]
TASK = registry.task("chat")

ASK, WRONG = {"role": "user", "content": "3*3?"}, {"role": "assistant", "content": "It is 6."}
AGAIN, RIGHT = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "It is 9."}
SYSTEM = {"role": "system", "content": "Be brief."}


def example(row: Row, **keys: Any) -> Any:
    return TASK.example(row, TASK.Config(**keys))


def refusal(row: Row, name: str = "chat") -> str:
    task = registry.task(name)
    with pytest.raises(DataError) as caught:
        task.example(row, task.Config())
    return str(caught.value)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_as_json_text(column: str) -> None:
    chat = [SYSTEM, ASK, {**RIGHT, "train": True, "lang": "日本"}, AGAIN]
    built = example({column: json.dumps(chat)})
    assert built == example({column: chat})
    config = TASK.Config()
    assert TASK.drops_messages({column: json.dumps(chat)}, config)
    unread = [SYSTEM, ASK, {**RIGHT, "content": [{"type": "text", "text": "9", "score": 1}]}]
    found = TASK.unused_keys({column: json.dumps(unread)}, config)
    assert list(found) == [f"{column}[].content[].score"]


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "[]",
        "[",
        "{}",
        '"hi"',
        "null",
        "7",
        7,
        {},
        None,
        r'[{"role": "user", "content": "\ud800"}]',
    ],
)
def test_other_texts_are_refused(value: Any) -> None:
    said = refusal({"messages": value})
    assert "column 'messages' = " in said
    assert "allowed: a list of messages, or its JSON text" in said


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "value": "3*3?"}, {"role": "assistant", "value": "It is 9."}],
        [{"role": "human", "value": "3*3?"}, {"role": "gpt", "value": "It is 9."}],
        [{"from": "user", "content": "3*3?"}, {"from": "gpt", "content": "It is 9."}],
        [{"role": "USER", "content": "3*3?"}, {"role": "Assistant", "content": "It is 9."}],
        [{"from": "HUMAN", "value": "3*3?"}, {"from": "ChatGPT", "value": "It is 9."}],
        [{"from": "human", "value": "3*3?", "role": None, "content": None},
         {"role": "assistant", "content": "It is 9.", "from": None, "value": None}],
    ],
)  # fmt: skip
def test_keys_and_roles_of_sharegpt(messages: list[Row]) -> None:
    built = example({"conversations": messages})
    assert (built.messages, built.trained) == ((ASK, RIGHT), (False, True))
    assert list(TASK.unused_keys({"conversations": messages}, TASK.Config())) == []


def test_a_chat_may_begin_with_the_answer_to_a_system_prompt() -> None:
    turns = [{"from": "system", "value": "Be brief."}, {"from": "gpt", "value": "It is 9."}]
    assert example({"conversations": turns}).messages == (SYSTEM, RIGHT)


def test_a_text_beside_another_is_unused() -> None:
    messages = [{"from": "human", "value": "3*3?", "content": "4*4?"}, {**RIGHT, "value": "x"}]
    row = {"conversations": messages}
    assert example(row).messages == (ASK, {**RIGHT, "value": "x"})
    assert list(TASK.unused_keys(row, TASK.Config())) == ["conversations[].content"]


def test_the_developer_is_the_system_to_most_templates(tiny_llama: Path) -> None:
    developer = {**SYSTEM, "role": "developer"}
    assert example({"messages": [developer, ASK, RIGHT]}).messages == (developer, ASK, RIGHT)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    as_system = chat_prompt_text([SYSTEM, ASK], tokenizer)
    assert chat_prompt_text([developer, ASK], tokenizer) == as_system
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'developer' %}!{% endif %}{{ m.role }}{% endfor %}"
    )
    assert chat_prompt_text([developer, ASK], tokenizer) == "!developeruser"


def test_a_prompt_and_completion_of_messages() -> None:
    prompt, completion = [SYSTEM, ASK, WRONG, AGAIN], [RIGHT]
    built = example({"prompt": prompt, "completion": completion})
    assert built.messages == (SYSTEM, ASK, WRONG, AGAIN, RIGHT)
    assert built.trained == (False, False, False, False, True)
    assert example({"prompt": prompt, "completion": "It is 9."}) == built
    everything = example({"prompt": prompt, "completion": completion}, train_on="all")
    assert (everything.messages, everything.train_all) == (built.messages, True)
    told = example({"prompt": "3*3?", "completion": [RIGHT, AGAIN, RIGHT]})
    assert (told.messages, told.trained) == (
        (ASK, RIGHT, AGAIN, RIGHT), (False, True, False, True)
    )  # fmt: skip
    assert example({"prompt": prompt[1:], "completion": completion, "system": "Be brief."}) == built
    last = [RIGHT, {**ASK, "name": "a", "content": [{"type": "text", "text": "b", "n": 1}]}]
    row = {"prompt": prompt, "completion": last}
    assert TASK.drops_messages(row, TASK.Config())
    assert set(TASK.unused_keys(row, TASK.Config())) == {
        "completion[].name", "completion[].content[].n"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": [ASK], "completion": [AGAIN]}, "column 'completion' has no assistant message"),
        (
            {"prompt": [ASK, RIGHT], "completion": [AGAIN]},
            "column 'completion' has no assistant message",
        ),
        ({"prompt": [ASK], "completion": []}, "column 'completion' = []; allowed: text or a list"),
        ({"prompt": [ASK], "completion": " "}, "column 'completion' is empty"),
        ({"prompt": ["a"], "completion": "b"}, "column 'prompt', message 1: \"a\"; allowed"),
        (
            {"prompt": {"a": 1}, "completion": "b"},
            "column 'prompt' = {\"a\": 1}; allowed: text or a",
        ),
        ({"prompt": None, "completion": "b"}, "column 'prompt' = null; allowed: text or a list"),
        ({"prompt": [ASK], "completion": "b", "history": [["a", "b"]]}, "column 'history' = "),
    ],
)
def test_invalid_lists_are_refused(row: Row, said: str) -> None:
    assert said in refusal(row)


@pytest.mark.parametrize("name", ["completion", "auto"])
def test_a_completion_refuses_lists_of_messages(name: str) -> None:
    for row in ({"prompt": [ASK], "completion": "9"}, {"prompt": "3*3?", "completion": [RIGHT]}):
        assert "task.name: chat, which reads lists of messages" in refusal(row, name)
