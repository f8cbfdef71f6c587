"""``chat``: message keys and further columns that change what is rendered or trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit import registry
from lorakit.data.sources import Split
from lorakit.errors import DataError

Row = dict[str, Any]
TASK = registry.task("chat")

ASK, WRONG = {"role": "user", "content": "3*3?"}, {"role": "assistant", "content": "It is 6."}
AGAIN, RIGHT = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "It is 9."}
SYSTEM = {"role": "system", "content": "Be brief."}
FUNCTION = {"name": "get_tide", "arguments": {"port": "Brest"}}
CALL = {"id": "c1", "type": "function", "function": FUNCTION}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "get_tide", "content": "low"}
TOOL = {
    "type": "function",
    "function": {"name": "get_tide", "parameters": {"type": "object", "properties": {}}},
}
ALPACA = {"instruction": "Add.", "input": "", "output": "4"}


def example(row: Row, **keys: Any) -> Any:
    return TASK.example(row, TASK.Config(**keys))


def chat(*messages: Row, **columns: Any) -> Any:
    return example({"messages": list(messages), **columns})


def refusal(row: Row, name: str = "chat") -> str:
    task = registry.task(name)
    with pytest.raises(DataError) as caught:
        task.example(row, task.Config())
    message = str(caught.value)
    assert "\n" not in message
    return message


OFF = ({"train": False}, {"training": False}, {"loss": False}, {"weight": 0}, {"weight": 0.0})
ON = ({}, {"train": True}, {"training": True, "loss": True}, {"weight": 1}, {"weight": 1.0})


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("on", ON)
def test_flags_select_the_trained_messages(off: Row, on: Row) -> None:
    built = chat({**ASK, **off}, {**WRONG, **off}, {**AGAIN, "train": None}, {**RIGHT, **on})
    assert built.messages == (ASK, WRONG, AGAIN, RIGHT)
    assert built.trained == (False, False, False, True)


def test_weights_of_the_messages() -> None:
    built = chat(ASK, {**WRONG, "weight": 0.25}, AGAIN, {**RIGHT, "train": True, "weight": 2})
    assert built.weights == (1.0, 0.25, 1.0, 2.0)
    assert built.trained == (False, True, False, True)
    row = {"messages": [ASK, {**WRONG, "weight": 0.25}, AGAIN, {**RIGHT, "weight": 0}]}
    assert example(row, train_on="last").weights == (1.0, 0.25)
    for weight in (0, 1, 1.0, None):
        assert chat(ASK, {**WRONG, "weight": weight}, AGAIN, RIGHT).weights is None


def test_flags_of_sharegpt() -> None:
    """As in data with a weight per turn, null for the system's."""
    turns = [
        {"from": "system", "value": "Be brief.", "weight": None},
        {"from": "human", "value": "3*3?", "weight": 0.0},
        {"from": "gpt", "value": "It is 6.", "weight": 0.0},
        {"from": "human", "value": "Sure?", "weight": 0.0},
        {"from": "gpt", "value": "It is 9.", "weight": 1.0},
    ]
    built = example({"conversations": turns})
    assert built.messages == (SYSTEM, ASK, WRONG, AGAIN, RIGHT)
    assert built.trained == (False, False, False, False, True)


def test_messages_after_the_last_trained_one_are_dropped() -> None:
    built = chat(ASK, RIGHT, AGAIN, {**WRONG, "train": False})
    assert (built.messages, built.trained) == ((ASK, RIGHT), (False, True))


def test_an_untrained_message_may_be_empty() -> None:
    empty = {"role": "assistant", "content": ""}
    assert chat(ASK, {**empty, "train": False}, AGAIN, RIGHT).messages[1] == empty
    assert "message 2: the assistant's content is empty" in refusal({"messages": [ASK, empty]})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight": -1}, "message 2: weight = -1; allowed: 0, or a number from 1e-06 to 1,000,000"),
        ({"weight": "0"}, 'weight = "0"; allowed: 0, or a number'),
        ({"weight": True}, "weight = true; allowed: 0, or a number"),
        ({"weight": float("nan")}, "weight = NaN; allowed: 0, or a number"),
        ({"weight": float("inf")}, "weight = Infinity; allowed: 0, or a number"),
        ({"weight": 10**400}, "allowed: 0, or a number"),
        ({"weight": 1e-9}, "weight = 1e-09; allowed: 0, or a number"),
        ({"weight": [1]}, "weight = [1]; allowed: 0, or a number"),
        ({"train": False, "weight": 0.5}, "train = false and weight = 0.5 contradict each other"),
        ({"train": "false"}, 'train = "false"; allowed: true or false'),
        ({"training": 0}, "training = 0; allowed: true or false"),
        ({"loss": 0.3}, "loss = 0.3; allowed: true or false"),
        ({"train": True, "weight": 0}, "train = true and weight = 0 contradict each other"),
        ({"train": True, "loss": False}, "train = true and loss = false contradict each other"),
        ({"train": False}, "exclude every assistant message"),
        ({"name": 3}, "name = 3; allowed: text"),
        ({"reasoning_content": ["a"]}, 'reasoning_content = ["a"]; allowed: text'),
        ({"function_call": {"name": "f"}}, 'function_call = {"name": "f"}; allowed: tool_calls = '),
        ({"content": None, "function_call": {"name": "f"}}, "allowed: tool_calls = "),
        ({"content": None}, "content = null; allowed: text"),
        ({"content": None, "tool_calls": []}, "content = null; allowed: text"),
        ({"tool_calls": "f()"}, 'tool_calls = "f()"; allowed: [{"type": "function"'),
        ({"tool_calls": {"id": 1}}, 'tool_calls = {"id": 1}; allowed: '),
        ({"tool_calls": [{"id": 1}]}, 'message 2, tool call 1: {"id": 1}; allowed: an object'),
        ({"tool_calls": [CALL, "f"]}, 'tool call 2: "f"; allowed: '),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, 'arguments = "{"; all'),
        ({"tool_calls": [{"function": {"name": "f", "arguments": []}}]}, "arguments = []; allowed"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, 'arguments = "[1]"'),
        ({"tool_calls": [{**CALL, "type": "custom"}]}, 'type = "custom"; allowed: function'),
    ],
)
def test_invalid_keys_are_refused(changes: Row, said: str) -> None:
    assert said in refusal({"messages": [ASK, {**RIGHT, **changes}]})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": True}, "message 1: train = true with role user: only the assistant's messages"),
        ({"weight": 1.0}, "weight = 1.0 with role user"),
        ({"weight": 0.5}, "weight = 0.5 with role user"),
        ({"role": "system", "loss": True}, "loss = true with role system"),
        ({"tool_calls": [CALL]}, "allowed: only in the assistant's messages"),
        ({"role": "function"}, 'role = "function"; allowed: system, developer, user, assistant'),
    ],
)
def test_keys_of_the_assistant_are_refused_elsewhere(changes: Row, said: str) -> None:
    assert said in refusal({"messages": [{**ASK, **changes}, RIGHT]})


def test_tool_calls_reach_the_template() -> None:
    built = chat(ASK, CALLING, RESULT, RIGHT, tools=[TOOL])
    calling = {"role": "assistant", "tool_calls": [CALL]}
    assert built.messages == (ASK, calling, RESULT, RIGHT)
    assert built.trained == (False, True, False, True)
    assert built.tools == (TOOL,)
    prompt = TASK.prompt(
        {"messages": [ASK, CALLING, RESULT, RIGHT], "tools": [TOOL]}, TASK.Config()
    )
    assert (prompt.messages, prompt.tools) == (built.messages[:-1], built.tools)


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ('{"port": "Brest"}', {"port": "Brest"}),
        ({"port": "Brest", "unit": None}, {"port": "Brest", "unit": None}),
        ('{"unit": null}', {"unit": None}),
        ("{}", {}),
        ("", {}),
        (None, {}),
        ({}, {}),
    ],
)
def test_arguments_become_a_mapping(arguments: Any, read: Row) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    for given in ([call], json.dumps([call])):
        (found,) = chat(ASK, {**RIGHT, "tool_calls": given}).messages[1]["tool_calls"]
        assert found == {"type": "function", "function": {"name": "f", "arguments": read}}
    (flat,) = chat(ASK, {**RIGHT, "tool_calls": [call["function"]]}).messages[1]["tool_calls"]
    assert flat == {"name": "f", "arguments": read}


def test_null_in_a_table_means_absent() -> None:
    """Each struct of a parquet file has the keys of all rows, at every depth."""
    keys = dict.fromkeys(("role", "content", "tool_calls", "tool_call_id", "weight"))
    padded = {"name": "get_tide", "arguments": {"port": "Brest", "unit": None}}
    call = {**CALL, "function": padded}
    tool = {"type": "function", "function": {"name": "f", "strict": None, "default": None}}
    built = chat(
        {**keys, **ASK},
        {**keys, **CALLING, "tool_calls": [call]},
        {**keys, "role": "tool", "content": "low", "tool_call_id": "c1"},
        {**keys, **RIGHT},
        tools=[tool],
    )
    result = {"role": "tool", "content": "low", "tool_call_id": "c1"}
    calling = {"role": "assistant", "tool_calls": [CALL]}
    assert built.messages == (ASK, calling, result, RIGHT)
    assert built.tools == ({"type": "function", "function": {"name": "f", "default": None}},)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_reaches_the_template(key: str) -> None:
    thought = {**RIGHT, key: "3+3+3"}
    assert chat(ASK, thought).messages[1] == thought
    assert chat(ASK, {**thought, "content": ""}).trained == (False, True)
    assert "content = null" in refusal({"messages": [ASK, {**thought, "content": None}]})


def test_an_unknown_key_reaches_the_template() -> None:
    turn = {**RIGHT, "tool_plan": "count", "channel": None, "value": "5"}
    assert chat(ASK, turn).messages[1] == {**RIGHT, "tool_plan": "count", "value": "5"}
    turns = [{"from": "human", "value": "3*3?", "lang": "en"}, {"from": "gpt", "value": "It is 9."}]
    assert example({"conversations": turns}).messages == ({**ASK, "lang": "en"}, RIGHT)


def test_function_calls_of_sharegpt() -> None:
    human, gpt = {"from": "human", "value": "3*3?"}, {"from": "gpt", "value": "It is 9."}
    called = {"from": "function_call", "value": json.dumps(FUNCTION)}
    seen = {"from": "observation", "value": "low"}
    built = example({"conversations": [human, called, seen, gpt], "tools": json.dumps([TOOL])})
    calling = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": FUNCTION}],
    }
    assert built.messages == (ASK, calling, {"role": "tool", "content": "low"}, RIGHT)
    assert built.trained == (False, True, False, True)
    assert built.tools == (TOOL,)
    for value in ("get_tide()", "[]", '{"name": "f"}', None):
        row = {"conversations": [human, {**called, "value": value}, seen, gpt]}
        assert "message 2: value = " in refusal(row)


SHAPES: tuple[Row, ...] = (
    {"messages": [ASK, RIGHT]},
    {"conversations": [{"from": "human", "value": "3*3?"}, {"from": "gpt", "value": "It is 9."}]},
    {"instruction": "3*3?", "output": "It is 9."},
    {"prompt": "3*3?", "completion": "It is 9."},
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: next(iter(shape)))
def test_columns_besides_the_messages(shape: Row) -> None:
    built = example({**shape, "system": "Be brief.", "tools": [TOOL]})
    assert built.messages == (SYSTEM, ASK, RIGHT)
    assert built.tools == (TOOL,)
    for empty in (None, "", " "):
        built = example({**shape, "system": empty, "tools": empty})
        assert (built.messages, built.tools) == ((ASK, RIGHT), None)
    assert example({**shape, "tools": []}).tools is None
    assert example({**shape, "tools": json.dumps([TOOL])}).tools == (TOOL,)
    for tools in ("get_tide", 3, json.dumps(TOOL), TOOL, [None], ["get_tide"], [{}]):
        assert "column 'tools'" in refusal({**shape, "tools": tools})
    assert "column 'system' = 3; allowed: text" in refusal({**shape, "system": 3})


def test_columns_besides_a_named_one() -> None:
    row = {"turns": [ASK, RIGHT], "system": "Be brief.", "tools": [TOOL]}
    built = example(row, messages_column="turns")
    assert (built.messages, built.tools) == ((SYSTEM, ASK, RIGHT), (TOOL,))


def test_two_system_messages() -> None:
    assert chat(SYSTEM, ASK, RIGHT, system="Be brief.").messages == (SYSTEM, ASK, RIGHT)
    said = refusal({"messages": [SYSTEM, ASK, RIGHT], "system": "Be long."})
    assert "column 'system' = \"Be long.\" contradicts the system message" in said


@pytest.mark.parametrize("shape", SHAPES[2:], ids=lambda shape: next(iter(shape)))
def test_history_comes_first_and_is_trained(shape: Row) -> None:
    pairs = [["Name a colour", "blue"], ["Another", "red"]]
    for history in (pairs, json.dumps(pairs)):
        built = example({**shape, "history": history, "system": "Be brief."})
        said = [message["content"] for message in built.messages]
        expected = ["Be brief.", "Name a colour", "blue", "Another", "red", "3*3?", "It is 9."]
        assert said == expected
        assert built.trained == (False, False, True, False, True, False, True)
    for empty in (None, [], "", "[]"):
        assert example({**shape, "history": empty}).messages == (ASK, RIGHT)


@pytest.mark.parametrize(
    ("history", "said"),
    [
        ("blue", "column 'history' = \"blue\"; allowed: [[QUESTION, ANSWER], ...]"),
        ({"a": "b"}, 'column \'history\' = {"a": "b"}; allowed: '),
        (["Name a colour", "blue"], 'pair 1: "Name a colour"; allowed: two texts'),
        ([["a", "b"], ["a"]], "column 'history', pair 2: [\"a\"]; allowed: two texts"),
        ([["a", None]], 'pair 1: ["a", null]; allowed: two texts'),
        ([["a", " "]], "pair 1: the answer is empty"),
    ],
)
def test_invalid_history_is_refused(history: Any, said: str) -> None:
    assert said in refusal({**ALPACA, "history": history})


@pytest.mark.parametrize("name", ["completion", "auto"])
@pytest.mark.parametrize("shape", SHAPES[2:], ids=lambda shape: next(iter(shape)))
def test_a_completion_refuses_history_and_tools(name: str, shape: Row) -> None:
    task = registry.task(name)
    for column, value in (("history", [["a", "b"]]), ("tools", [TOOL])):
        said = refusal({**shape, column: value}, name)
        assert f"column {column!r} = " in said
        assert f"task.name: chat, which reads {column}" in said
        with pytest.raises(DataError, match=r"task\.name: chat"):
            task.prompt({**shape, column: value}, task.Config())
        for empty in (None, [], "", "[]"):
            assert task.example({**shape, column: empty}, task.Config())


def test_the_system_text_of_a_completion() -> None:
    task = registry.task("completion")
    row = {"prompt": "3*3?", "completion": "9", "system": "Be brief."}
    built = task.example(row, task.Config())
    assert built.segments[0].text == "Be brief.\n\n3*3?"
    assert task.prompt(row, task.Config()).segments == built.segments[:1]
    own = task.Config(template="{prompt} ")
    assert task.example(row, own).segments[0].text == "3*3? "


def split_of(*rows: Row) -> Split:
    return Split("validation", list(rows), "rows", "0")


def test_exact_match_uses_the_last_trained_message() -> None:
    config = TASK.Config()
    row = {"messages": [ASK, RIGHT, AGAIN, {**WRONG, "train": False}]}
    assert TASK.prompt(row, config).messages == (ASK,)
    assert TASK.metrics(["It is 9."], split_of(row), config) == {"exact_match": 1.0}


@pytest.mark.parametrize(
    ("last", "key"),
    [
        (CALLING, "tool_calls"),
        ({**RIGHT, "tool_calls": [CALL]}, "tool_calls"),
        ({**RIGHT, "reasoning_content": "3+3+3"}, "reasoning_content"),
        ({**RIGHT, "thinking": "3+3+3"}, "thinking"),
    ],
)
def test_exact_match_needs_plain_text(last: Row, key: str) -> None:
    rows = {"messages": [ASK, RIGHT]}, {"messages": [ASK, last]}
    said = f"message 2: the last trained message has {key}"
    with pytest.raises(DataError, match=said):
        TASK.prompt(rows[1], TASK.Config())
    with pytest.raises(DataError, match=f"rows, row 2: {said}"):
        TASK.metrics(["a", "b"], split_of(*rows), TASK.Config())
    assert TASK.example(rows[1], TASK.Config()).trained == (False, True)


@pytest.mark.parametrize(("history", "notes"), [(None, 1), ([["a", "b"]], 2)])
def test_trained_history_is_reported(history: Any, notes: int, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    row = ALPACA if history is None else {**ALPACA, "history": history}
    file.write_text(json.dumps(row), encoding="utf-8")
    config = TASK.Config(path=str(file))
    found = TASK.load(config, "train")
    assert found is not None
    said = TASK.notes(config, found)
    assert len(said) == notes
    if history:
        assert "(columns instruction, output, input, history)" in said[0]
        assert said[1] == f"{file}: answers in the column history are trained too"
