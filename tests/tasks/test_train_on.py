"""``task.train_on``: which part of a row the loss covers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import lorakit
from lorakit import registry
from lorakit.data.encode import EncodedSplit, encode_split
from lorakit.data.notes import split_notes
from lorakit.data.sources import Split
from lorakit.errors import DataError, RecipeError
from tests.training.runs import write_recipe_file

Row = dict[str, Any]
SYSTEM = {"role": "system", "content": "Be brief."}
ASK, SIX = {"role": "user", "content": "3*3?"}, {"role": "assistant", "content": "It is 6."}
AGAIN, NINE = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "It is 9."}
CHAT = [SYSTEM, ASK, SIX, AGAIN, NINE]


def encoded(tiny_llama: Path, name: str, row: Row, **keys: Any) -> tuple[EncodedSplit, Any]:
    task, tokenizer = registry.task(name), AutoTokenizer.from_pretrained(tiny_llama)
    config = task.Config(**keys)
    split = Split("train", [row], "rows", "0")
    rows = encode_split(split, lambda r: task.example(r, config), tokenizer, config.max_length)
    return rows, tokenizer


def trained_text(tiny_llama: Path, name: str, row: Row, **keys: Any) -> str:
    rows, tokenizer = encoded(tiny_llama, name, row, **keys)
    assert len(rows) == 1
    return str(tokenizer.decode(rows[0].input_ids[rows[0].loss_mask]))


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [
        ("assistant", "It is 6.</s>It is 9.</s>"),
        ("last", "It is 9.</s>"),
        ("all", "<system>Be brief.</s><user>3*3?</s><assistant>It is 6.</s><user>Sure?</s>"
                "<assistant>It is 9.</s>"),
    ],
)  # fmt: skip
def test_a_chat(train_on: str, trained: str, tiny_llama: Path) -> None:
    assert trained_text(tiny_llama, "chat", {"messages": CHAT}, train_on=train_on) == trained


def test_all_includes_messages_after_the_last_answer(tiny_llama: Path) -> None:
    row = {"messages": [ASK, NINE, AGAIN]}
    trained = trained_text(tiny_llama, "chat", row, train_on="all")
    assert trained == "<user>3*3?</s><assistant>It is 9.</s><user>Sure?</s>"
    assert trained_text(tiny_llama, "chat", row, train_on="last") == "It is 9.</s>"
    assert trained_text(tiny_llama, "chat", {"messages": [ASK]}, train_on="all") == "<user>3*3?</s>"
    task = registry.task("chat")
    assert task.drops_messages(row, task.Config(train_on="last"))
    assert not task.drops_messages(row, task.Config(train_on="all"))


def test_last_is_the_last_of_those_that_no_flag_excludes() -> None:
    task = registry.task("chat")
    row = {"messages": [ASK, SIX, AGAIN, {**NINE, "train": False}]}
    built = task.example(row, task.Config(train_on="last"))
    assert (built.messages, built.trained) == ((ASK, SIX), (False, True))
    row = {"prompt": "3*3?", "completion": "It is 9.", "history": [["a", "b"]]}
    assert task.example(row, task.Config(train_on="last")).trained == (False, False, False, True)


@pytest.mark.parametrize("weight", [0, 0.5])
def test_all_contradicts_a_weight(weight: float) -> None:
    task = registry.task("chat")
    row = {"messages": [ASK, {**SIX, "weight": weight}, AGAIN, NINE]}
    with pytest.raises(DataError, match=r"message 2: .* task\.train_on = all .* allowed: assi"):
        task.example(row, task.Config(train_on="all"))


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_generation_is_evaluated_on_the_last_answer(train_on: str) -> None:
    task = registry.task("chat")
    config = task.Config(train_on=train_on)
    row = {"messages": [*CHAT, AGAIN]}
    assert list(task.prompt(row, config).messages) == CHAT[:-1]
    assert task.metrics(["It is 9."], Split("a", [row], "a", "0"), config) == {"exact_match": 1.0}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("completion", {"prompt": "3*3? ", "completion": "9"}),
        ("completion", {"prompt": "3*3? ", "completion": "9</s>"}),
    ],
)
def test_a_completion(name: str, row: Row, tiny_llama: Path) -> None:
    assert trained_text(tiny_llama, name, row) == "9</s>"
    keys = {"train_on": "prompt_and_completion"}
    assert trained_text(tiny_llama, name, row, **keys) == "3*3? 9</s>"
    rows, _ = encoded(tiny_llama, name, row, **keys)
    plain, _ = encoded(tiny_llama, name, row)
    assert rows[0].input_ids.tolist() == plain[0].input_ids.tolist()


def test_a_long_prompt_loses_its_beginning_also_if_it_is_trained(tiny_llama: Path) -> None:
    row = {"prompt": "abcdefgh", "completion": "9"}
    keys = {"train_on": "prompt_and_completion", "max_length": 6}
    assert trained_text(tiny_llama, "completion", row, **keys).endswith("h9</s>")


def test_all_reports_what_the_template_ignores(tiny_llama: Path) -> None:
    task, tokenizer = registry.task("chat"), AutoTokenizer.from_pretrained(tiny_llama)
    config = task.Config(train_on="all")

    def encode(*messages: Row) -> list[str]:
        split = Split("train", [{"messages": list(messages)}], "rows", "0")
        rows = encode_split(split, lambda r: task.example(r, config), tokenizer, 64)
        return split_notes(rows, split, 64)

    assert encode(ASK, NINE) == []
    (said,) = encode(ASK, {**NINE, "reasoning_content": "3+3+3", "name": "calculator"})
    assert "ignores these keys of messages: 'name' (1), 'reasoning_content' (1)" in said
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}"
    )
    assert encode(ASK, NINE) == []
    with pytest.raises(DataError, match="message 1: the chat template omits this system message"):
        encode(SYSTEM, ASK, NINE)


@pytest.mark.parametrize(
    ("task", "value", "allowed"),
    [
        ("chat", "prompt_and_completion", "allowed: assistant, last, all"),
        ("completion", "last", "allowed: completion, prompt_and_completion"),
    ],
)
def test_a_value_of_another_task_is_refused(
    task: str, value: str, allowed: str, tiny_llama: Path, tmp_path: Path
) -> None:
    file = write_recipe_file(tmp_path, tiny_llama, task, task__train_on=value)
    with pytest.raises(RecipeError) as caught:
        lorakit.load_recipe(file)
    assert f'task.train_on = "{value}"' in str(caught.value)
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ({"content": "9", "reasoning_content": "3+3+3", "thinking": "x", "reasoning": "y"}, "9"),
        ({"content": "<think>3+3+3</think>\n\n9"}, "9"),
        ({"content": "3+3+3</think>\n9"}, "9"),
        ({"content": "<think>3</think>It <think>3\n3</think>is 9"}, "It is 9"),
        ({"content": " 9 </thinking>"}, " 9 </thinking>"),
        ({"content": "<think>3"}, "<think>3"),
    ],
)
def test_dropped_reasoning(answer: Row, kept: str) -> None:
    task = registry.task("chat")
    config = task.Config(reasoning="drop")
    question = {"role": "user", "content": "<think>hm</think>3*3?"}
    row = {"messages": [question, {"role": "assistant", **answer}]}
    assert task.example(row, config).messages == (
        question, {"role": "assistant", "content": kept}
    )  # fmt: skip
    assert task.metrics([kept], Split("a", [row], "a", "0"), config) == {"exact_match": 1.0}


def test_a_message_of_reasoning_only_cannot_be_trained_without_it() -> None:
    task = registry.task("chat")
    thought = {"role": "assistant", "content": "<think>3+3+3</think>"}
    with pytest.raises(DataError, match=r"message 2: .* task\.reasoning = drop removes"):
        task.example({"messages": [ASK, thought]}, task.Config(reasoning="drop"))
    row = {"messages": [ASK, {**thought, "train": False}, AGAIN, NINE]}
    assert task.example(row, task.Config(reasoning="drop")).messages[1]["content"] == ""
