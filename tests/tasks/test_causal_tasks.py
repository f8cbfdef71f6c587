"""``chat``, ``text``, ``e2e_nlg`` and ``completion``: examples from rows, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit import registry
from lorakit.errors import DataError

TASKS = registry.tasks()


def example(name: str, row: dict[str, Any], **keys: Any) -> Any:
    return TASKS[name].example(row, TASKS[name].Config(**keys))


def message(role: Any, content: Any = "hello") -> dict[str, Any]:
    return {"role": role, "content": content}


def test_chat_drops_messages_after_the_last_answer() -> None:
    turns = [message("user"), message("assistant"), message("user"), message("tool")]
    assert len(example("chat", {"messages": turns}).messages) == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], "allowed: a list of messages"),
        ("hello", "allowed: a list of messages"),
        (None, "allowed: a list of messages"),
        ([message("user")], "no assistant message"),
        ([message("user"), "hi"], 'message 2: "hi"'),
        ([message("human"), message("assistant")], 'message 1: role = "human"; allowed: system'),
        ([message(None), message("assistant")], "message 1: role = null"),
        ([message("user"), message("assistant", None)], "message 2: content = null"),
        (
            [message("user"), message("assistant", " ")],
            "message 2: the assistant's content is empty",
        ),
        ([message(["user"]), message("assistant")], "message 1: role = "),
    ],
)
def test_invalid_chats_are_refused(value: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        example("chat", {"messages": value})


def test_any_columns() -> None:
    turns = [message("user"), message("assistant")]
    assert len(example("chat", {"turns": turns}, messages_column="turns").messages) == 2
    assert example("text", {"body": "x"}, text_column="body").segments[0].text == "x"


def test_text_is_trained_on_every_token() -> None:
    built = example("text", {"text": " a\n b "})
    assert [(segment.text, segment.trained) for segment in built.segments] == [(" a\n b ", True)]
    assert built.eos


@pytest.mark.parametrize("value", [None, 3, "", " \n"])
def test_invalid_text_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match="column 'text'"):
        example("text", {"text": value})


def test_e2e() -> None:
    row = {"meaning_representation": "name[A], near[B]", "human_reference": "A is near B."}
    built = example("e2e_nlg", row)
    assert [(segment.text, segment.trained) for segment in built.segments] == [
        ("name[A], near[B]\ntext:", False),
        (" A is near B.", True),
    ]
    task = TASKS["e2e_nlg"]
    assert task.prompt(row, task.Config()).segments == built.segments[:1]
    for column in row:
        with pytest.raises(DataError, match=column):
            example("e2e_nlg", {**row, column: " "})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": " "}, "'completion' is empty"),
        ({"prompt": None, "completion": "b"}, "'prompt' = null"),
    ],
)
def test_invalid_completions_are_refused(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        example("completion", row)


@pytest.mark.parametrize(
    ("name", "path", "rows"),
    [
        ("e2e_nlg", "e2e_nlg", 42_061),
        ("chat", {"train": "instructions/gsm8k_train.jsonl.gz"}, 7_473),
        ("chat", {"train": "instructions/self_instruct_seed.jsonl.gz"}, 175),
        ("completion", "wikisql/mlx_lora_text", 1_000),
        ("text", "wikisql/mlx_lora_text", 1_000),
    ],
)
def test_released_rows(data_dir: Path, name: str, path: Any, rows: int) -> None:
    resolved = (
        {split: str(data_dir / file) for split, file in path.items()}
        if isinstance(path, dict)
        else str(data_dir / path)
    )
    task = TASKS[name]
    config = task.Config(path=resolved)
    split = task.load(config, "train")
    assert len(split) == rows
    for index in range(0, rows, 50):
        task.example(split.rows[index], config)


@pytest.mark.parametrize("name", ["chat", "text", "e2e_nlg", "completion"])
def test_path_or_hub_is_required(name: str) -> None:
    task = TASKS[name]
    with pytest.raises(DataError, match=r"task\.path = null: "):
        task.load(task.Config(), "train")


def test_a_missing_column_is_named_with_the_existing_ones(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"body": "x"}\n')
    task = TASKS["text"]
    with pytest.raises(DataError, match="row 1: unknown format: the columns are 'body'"):
        task.load(task.Config(path=str(tmp_path)), "train")
    with pytest.raises(DataError, match="no column 'words'; the columns are 'body'"):
        task.load(task.Config(path=str(tmp_path), text_column="words"), "train")
