"""Row formats: recognized, reported, read and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lorakit import registry
from lorakit.data.sources import Split
from lorakit.errors import DataError
from lorakit.pipeline.task_data import settle

Row = dict[str, Any]

USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN, GPT = {"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}
ALPACA = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
PAIR = {"prompt": "2+2?", "completion": "4"}

#: Name, row, task that ``auto`` chooses, what is said.
SHAPES: dict[str, tuple[Row, str, str]] = {
    "messages": ({"messages": [USER, REPLY]}, "chat", "OpenAI messages (column messages)"),
    "sharegpt": ({"conversations": [HUMAN, GPT]}, "chat", "ShareGPT (column conversations)"),
    "alpaca": (ALPACA, "completion", "Alpaca (columns instruction, output, input)"),
    "prompt_completion": (PAIR, "completion", "prompt and completion (columns prompt, completion)"),
    "text": ({"text": "a b"}, "text", "plain text (column text)"),
}


def rows_file(folder: Path, *rows: Row) -> str:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def loaded(name: str, path: str, **keys: Any) -> tuple[Any, Any, Split]:
    task = registry.task(name)
    config = task.Config(path=path, **keys)
    found = task.load(config, "train")
    assert found is not None
    return task, config, found


def example(name: str, row: Row, **keys: Any) -> Any:
    task = registry.task(name)
    return task.example(row, task.Config(**keys))


def texts(built: Any) -> list[str]:
    return [segment.text for segment in built.segments]


@pytest.mark.parametrize("shape", SHAPES)
def test_auto_chooses_a_task_and_reports_it(shape: str, tmp_path: Path) -> None:
    row, name, said = SHAPES[shape]
    keys = {} if name == "text" else {"stop": ["\n"], "max_new_tokens": 3}
    task, config, found = loaded("auto", rows_file(tmp_path, row), **keys)
    notes: list[str] = []
    chosen, own = settle(task, config, found, notes.append)
    assert chosen is registry.task(name)
    assert own.name == name
    assert notes == [f"{found.source}: recognized as {said}: task {name}"]
    assert chosen.example(row, own) == task.example(row, config)
    if name != "text":
        assert (own.stop, own.max_new_tokens) == (["\n"], 3)
        assert own.eval_generate == type(chosen).Config().eval_generate
        assert chosen.prompt(row, own) == task.prompt(row, config)


def test_auto_refuses_a_key_of_another_task(tmp_path: Path) -> None:
    task, config, found = loaded("auto", rows_file(tmp_path, {"text": "a"}), num_beams=3)
    with pytest.raises(DataError, match=r"task\.num_beams: .*choose the task text, which has no"):
        task.chosen(config, found)


def test_auto_may_generate_until_it_has_chosen() -> None:
    task = registry.task("auto")
    assert task.generates(task.Config())
    assert not task.generates(task.Config(), final=False)
    assert not task.generates(task.Config(eval_generate="never"))


@pytest.mark.parametrize("shape", SHAPES)
def test_only_a_recognized_format_is_reported(shape: str, tmp_path: Path) -> None:
    row, name, said = SHAPES[shape]
    path = rows_file(tmp_path, row)
    task, config, found = loaded(name, path)
    assert task.notes(config, found) == [f"{found.source}: recognized as {said}"]
    task, config, found = loaded(name, path, format=shape)
    assert task.notes(config, found) == []


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [SYSTEM, USER, REPLY]}, [SYSTEM, USER, REPLY]),
        ({"conversations": [HUMAN, GPT]}, [USER, REPLY]),
        ({"conversations": [USER, REPLY], "system": None}, [USER, REPLY]),
        ({"conversations": [HUMAN, GPT], "system": "Be brief."}, [SYSTEM, USER, REPLY]),
        # As parquet has it: the keys of all turns in each.
        (
            {"conversations": [{**HUMAN, "role": None, "content": None}, GPT]},
            [USER, REPLY],
        ),
        (
            {"messages": [USER, {"role": "tool", "content": "x"}, REPLY]},
            [USER, {"role": "tool", "content": "x"}, REPLY],
        ),
        (
            {"conversations": [HUMAN, {"from": "observation", "value": "x"}, GPT]},
            [USER, {"role": "tool", "content": "x"}, REPLY],
        ),
        (ALPACA, [{"role": "user", "content": "Add.\n\n2 and 2"}, REPLY]),
        ({**ALPACA, "input": " "}, [{"role": "user", "content": "Add."}, REPLY]),
        (
            {"instruction": "2+2?", "output": "4", "system": "Be brief."},
            [SYSTEM, USER, REPLY],
        ),
        (PAIR, [USER, REPLY]),
    ],
)
def test_chat_reads_every_format(row: Row, expected: list[Row]) -> None:
    assert example("chat", row).messages == tuple(expected)
    task = registry.task("chat")
    assert task.prompt(row, task.Config()).messages == tuple(expected[:-1])


WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nAdd.\n\n### Response:"
)


@pytest.mark.parametrize(
    ("changes", "prompt"),
    [
        ({}, WITH_INPUT),
        ({"input": ""}, WITHOUT_INPUT),
        ({"input": None}, WITHOUT_INPUT),
        (
            {"input": None, "system": "Be brief."},
            "Be brief.\n\n### Instruction:\nAdd.\n\n### Response:",
        ),
    ],
)
def test_the_alpaca_prompt(changes: Row, prompt: str) -> None:
    assert texts(example("completion", ALPACA | changes)) == [prompt, "4"]


def test_alpaca_without_the_column_input() -> None:
    row = {"instruction": "Add.", "output": "4"}
    assert texts(example("completion", row)) == [WITHOUT_INPUT, "4"]


def test_named_columns_take_precedence_over_recognition() -> None:
    row = PAIR | ALPACA | {"q": "3+3?", "turns": [USER, REPLY]}
    assert texts(example("completion", row, prompt_column="q")) == ["3+3?", "4"]
    assert example("chat", row, messages_column="turns").messages == (USER, REPLY)
    assert texts(example("completion", row, format="prompt_completion")) == ["2+2?", "4"]
    assert texts(example("text", row | {"text": "a"}, text_column="q")) == ["3+3?"]


@pytest.mark.parametrize(
    ("name", "row", "parts"),
    [
        ("completion", PAIR | ALPACA, ("alpaca (columns", "prompt_completion or", "or alpaca")),
        ("chat", {"messages": [USER, REPLY]} | PAIR, ("messages or prompt_completion",)),
        ("auto", {"text": "a"} | PAIR, ("prompt_completion or text",)),
    ],
)
def test_ambiguous_columns(name: str, row: Row, parts: tuple[str, ...], tmp_path: Path) -> None:
    path = rows_file(tmp_path, row)
    with pytest.raises(DataError, match="several formats") as caught:
        loaded(name, path)
    message = str(caught.value)
    assert message.startswith(f'task.format = "auto": {path}: the columns ')
    assert "choose one with task.format: " in message
    assert all(part in message for part in parts if not part.startswith("or "))
    loaded(name, path, format="prompt_completion")


def test_an_unknown_format_shows_the_row(tmp_path: Path) -> None:
    path = rows_file(tmp_path, {"query": "2+2?", "reply": "4" * 500})
    for name in ("chat", "completion", "text", "auto"):
        with pytest.raises(DataError) as caught:
            loaded(name, path)
        message = str(caught.value)
        start = f"task.format = \"auto\": {path}, row 1: unknown format: the columns are 'query', "
        assert message.startswith(start)
        assert '{"query": "2+2?", "reply": "4444' in message
        assert len(message) < 800
        assert "\n" not in message
        for shape in registry.task(name).formats:
            assert shape in message.partition("allowed: ")[2]


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("chat", {"conversations": "hi"}, "column 'conversations' = \"hi\""),
        ("chat", {"conversations": [{"from": "cat", "value": "x"}]}, 'message 1: from = "cat"'),
        ("chat", {"conversations": [HUMAN, {"from": "gpt", "value": None}]}, "2: value = null"),
        ("chat", {"conversations": [HUMAN]}, "no assistant message"),
        ("chat", {"messages": [{**USER, "content": [{"type": "image_url"}]}]}, "content = [{"),
        ("chat", {"messages": [{**USER, "content": []}]}, "content = []; allowed: text"),
        ("chat", ALPACA | {"output": " "}, "column 'output' is empty"),
        ("chat", PAIR | {"prompt": 3}, "column 'prompt' = 3"),
        ("completion", ALPACA | {"output": ""}, "column 'output' is empty"),
        ("completion", ALPACA | {"input": 3}, "column 'input' = 3"),
        ("completion", ALPACA | {"instruction": None}, "column 'instruction' = null"),
    ],
)
def test_invalid_rows_are_refused(name: str, row: Row, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        example(name, row)
    assert expected in str(caught.value)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    chat = example("chat", {"messages": [{**USER, "content": parts}, REPLY]})
    assert chat.messages[0] == {"role": "user", "content": "Hello"}


def test_a_quoted_value_is_shortened_to_one_line() -> None:
    with pytest.raises(DataError) as caught:
        example("chat", {"messages": ["\u2028\x9b" + "x" * 1000]})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


def test_a_chat_that_starts_with_the_assistant_has_no_prompt() -> None:
    task = registry.task("chat")
    with pytest.raises(DataError, match="nothing to answer"):
        task.prompt({"messages": [REPLY]}, task.Config())


@pytest.mark.parametrize(
    "keys",
    [
        {"prompt_column": "a", "template": "{a}"},
        {"completion_column": "a", "completion_template": "{a}"},
        {"format": "alpaca", "prompt_column": "a"},
        {"format": "messages"},
    ],
)
def test_mutually_exclusive_keys_are_refused(keys: Row) -> None:
    with pytest.raises(ValidationError):
        registry.task("completion").Config(**keys)


@pytest.mark.parametrize("shape", ["alpaca", "prompt_completion"])
def test_a_messages_column_excludes_other_formats(shape: str) -> None:
    with pytest.raises(ValidationError, match="mutually exclusive"):
        registry.task("chat").Config(messages_column="a", format=shape)


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("completion", {"top_p": 0.9}, "top_p\n.*no effect with task.temperature = 0"),
        (
            "completion",
            {"length_penalty": 0.8},
            "length_penalty\n.*no effect with task.num_beams = 1; allowed: 1.0",
        ),
        ("completion", {"num_beams": 10**30}, "less than or equal to 1000"),
        ("completion", {"num_beams": 2, "temperature": 0.5}, "but task.num_beams is 2; allowed: 0"),
        ("e2e_nlg", {"temperature": 0.5}, "but task.num_beams is 10; allowed: 0"),
        ("completion", {"num_beams": 2, "length_penalty": 500.0}, "less than or equal to 10"),
        ("e2e_nlg", {"num_beams": 1, "length_penalty": 0.8}, "length_penalty\n.*no effect"),
    ],
)
def test_a_key_without_effect_is_refused(name: str, keys: Row, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        registry.task(name).Config(**keys)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("completion", {"top_p": 1.0, "length_penalty": 1.0}),
        ("completion", {"top_p": 0.9, "temperature": 0.5}),
        ("e2e_nlg", {"num_beams": 1}),
        ("e2e_nlg", {"num_beams": 1, "length_penalty": 1.0}),
    ],
)
def test_a_resolved_recipe_is_read_again(name: str, keys: Row) -> None:
    config = registry.task(name).Config(**keys)
    assert type(config)(**config.model_dump()) == config


def split_of(*rows: Row) -> Split:
    return Split("validation", list(rows), "rows", "0")


@pytest.mark.parametrize(("name", "generates"), [("completion", True), ("chat", False)])
def test_exact_match(name: str, generates: bool) -> None:
    task = registry.task(name)
    config = task.Config(stop=["\n", "Q:"])
    assert task.stop_texts(config) == ("\n", "Q:")
    found = split_of(PAIR, PAIR | {"completion": " five"})
    assert task.metrics([" 4 ", "six"], found, config) == {"exact_match": 0.5}
    assert task.generates(config) is generates
    assert task.main_metric(config) == ("exact_match" if generates else "loss")
    assert task.best_metric(config) == "loss"
    always = task.Config(eval_generate="always")
    assert task.best_metric(always) == task.main_metric(always) == "exact_match"
    with pytest.raises(DataError, match="prediction 2: 4; allowed: text"):
        task.metrics(["4", 4], found, config)
    with pytest.raises(DataError, match="1 prediction for 2 rows"):
        task.metrics(["4"], found, config)
