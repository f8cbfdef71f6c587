"""Notes on columns, keys and labels of a split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakit import registry
from lorakit.data.rows import UnreadRow
from lorakit.data.sources import Split
from lorakit.pipeline.task_data import settle
from lorakit.tasks import checks
from lorakit.tasks.checks import (
    ColumnWatch,
    column_notes,
    counts_line,
    label_counts,
    similar_labels,
)

Row = dict[str, Any]

USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
HUMAN, GPT = {"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}
PAIR = {"prompt": "2+2?", "completion": "4"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def calling(**keys: Any) -> Row:
    """Return an assistant message with a tool call that has extra keys."""
    return {**REPLY, "tool_calls": [{**CALL, **keys}]}


def split_of(*rows: Row) -> Split:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Split("train", [{name: row.get(name) for name in names} for row in rows], "rows", "0")


def unused_note(task: Any, config: Any, split: Split) -> str | None:
    """Return the only line, if any."""
    said = column_notes(task, config, split)
    assert len(said) < 2
    return said[0] if said else None


def note(name: str, *rows: Row, **keys: Any) -> str | None:
    task = registry.task(name)
    return unused_note(task, task.Config(name=name, **keys), split_of(*rows))


def loaded(path: Path, name: str = "chat") -> tuple[Any, Any, Split]:
    task = registry.task(name)
    config = task.Config(path=str(path))
    found = task.load(config, "train")
    assert found is not None
    return task, config, found


def test_columns_and_keys_are_counted_by_row() -> None:
    rows = [
        {"messages": [USER, calling(foo=1), USER, calling(foo=2)], "bar": 0},
        {"messages": [USER, REPLY], "bar": False},
        {"messages": [USER, calling(foo=None)], "bar": None},
        {"messages": [USER, REPLY, USER, calling(foo="x")], "bar": "x"},
        {"messages": [USER, REPLY]},
    ]
    said = "column bar (3), messages[].tool_calls[].foo (2)"
    said = f"train: 3 of 5 rows have values that the task does not use: {said}"
    assert note("chat", *rows) == said


@pytest.mark.parametrize("empty", [None, "", " ", [], {}])
def test_empty_values_are_not_reported(empty: Any) -> None:
    row = {"messages": [USER, calling(foo=empty)], "bar": empty}
    assert note("chat", row) is None


def test_used_keys_are_not_reported() -> None:
    called = {"role": "assistant", "tool_calls": [{"id": "1", **CALL}]}
    turns = [USER, called, {"role": "tool", "content": "x", "tool_call_id": "1", "name": "f"}]
    reply = {**REPLY, "train": True, "weight": 1, "reasoning_content": "r", "thinking": "r"}
    assert note("chat", {"messages": [*turns, reply], "system": "s", "tools": [{"a": 1}]}) is None
    assert note("chat", {"conversations": [HUMAN, GPT], "system": "s", "tools": "[]"}) is None
    alpaca = {
        "instruction": "a",
        "input": "b",
        "output": "c",
        "system": "s",
        "history": [["a", "b"]],
    }
    assert note("chat", alpaca) is None
    assert note("completion", alpaca) is None


@pytest.mark.parametrize(
    ("name", "row", "keys", "listed"),
    [
        # Data of other trainers, for preferences and with weights or labels.
        ("chat", PAIR | {"chosen": "4", "rejected": "5"}, {}, "column chosen, column rejected"),
        ("completion", PAIR | {"label": True}, {}, "column label"),
        ("completion", PAIR | {"text": "x", "id": 3}, {}, "column text, column id"),
        ("completion", {"q": "a", "a": "b", "tools": [1]}, {"prompt_column": "q", "completion_column": "a"}, "column tools"),
        ("completion", {"q": "a", "system": "s"}, {"template": "{q}", "completion_template": "x"}, "column system"),
        ("text", {"text": "a", "meta": {"url": "x"}}, {}, "column meta"),
        ("text", {"text": "a", "body": "b"}, {"text_column": "body"}, "column text"),
        ("classification", {"text": "a", "label": "b", "idx": 0}, {}, "column idx"),
        ("classification", {"text": "a", "pair": "b", "label": "b"}, {}, "column pair"),
        ("glue/sst2", {"sentence": "a", "label": 1, "idx": 3, "split": "x"}, {}, "column split"),
        ("glue/sst2", {"sentence": "a", "label": 1, "idx": 3}, {}, None),
        ("e2e_nlg", {"meaning_representation": "a", "human_reference": "b", "n": 1}, {}, "column n"),
        ("chat", {"messages": [USER, REPLY], "history": [["a", "b"]]}, {}, "column history"),
        ("chat", {"messages": [USER, REPLY], "functions": [{}]}, {}, "column functions"),
        ("chat", {"turns": [USER, calling(x=1)], "messages": [{"y": 1}]}, {"messages_column": "turns"}, "turns[].tool_calls[].x, column messages"),
        ("chat", {"conversations": [HUMAN, {**GPT, "content": "5"}]}, {}, "conversations[].content"),
        ("chat", {"messages": [USER, calling(index=0)]}, {}, "messages[].tool_calls[].index"),
        ("chat", {"messages": [{**USER, "content": [{"type": "text", "text": "a", "cache": 1}]}, REPLY]}, {}, "messages[].content[].cache"),
        ("auto", {"messages": [USER, calling(x=1)], "id": 1}, {}, "messages[].tool_calls[].x, column id"),
        ("auto", PAIR | {"id": 1}, {}, "column id"),
        ("chat", {"messages": [USER, calling(**{"a b": 1})], "\x1b[2J": 1}, {}, r'"messages[].tool_calls[].a b", column "\u001b[2J"'),
    ],
)  # fmt: skip
def test_each_task_reports_its_unused_keys(
    name: str, row: Row, keys: Row, listed: str | None
) -> None:
    said = note(name, row, **keys)
    if listed is None:
        assert said is None
        return
    assert said is not None
    assert said.isprintable()
    start, _, found = said.partition(" values that the task does not use: ")
    assert start == "train: 1 of 1 rows have"
    assert sorted(found.split(", ")) == sorted(f"{key} (1)" for key in listed.split(", "))


def test_invalid_rows_do_not_break_the_count() -> None:
    rows = [{"messages": value, "x": 1} for value in (None, 3, "a", [], [3], [{"role": 1}])]
    rows.append(
        {"messages": [{**USER, "content": [3], "tool_calls": [3, {"function": 3}]}], "x": 1}
    )
    assert (
        note("chat", *rows)
        == "train: 7 of 7 rows have values that the task does not use: column x (7)"
    )


def test_wikisql_rows(tmp_path: Path) -> None:
    table = {"id": "t", "header": ["a"], "types": ["text"]}
    row = {"phase": 1, "table_id": "t", "question": "q", "sql": {"sel": 0, "agg": 0, "conds": []}}
    (tmp_path / "train.tables.jsonl").write_text(json.dumps(table))
    (tmp_path / "train.jsonl").write_text(
        f"{json.dumps(row)}\n{json.dumps({**row, 'note': 'x'})}\n"
    )
    said = unused_note(*loaded(tmp_path, "wikisql"))
    assert said == "train: 1 of 2 rows have values that the task does not use: column note (1)"
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n")
    assert unused_note(*loaded(tmp_path, "wikisql")) is None


def test_nulls_of_parquet_are_not_counted(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [USER, {**REPLY, "weight": 1}], "note": None},
        {"messages": [USER, calling(foo="x")], "note": "x"},
        {"messages": [USER, calling(foo=None)], "note": None},
    ]
    keys = dict.fromkeys(("role", "content", "weight", "tool_calls"))
    padded = [{**row, "messages": [keys | turn for turn in row["messages"]]} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(padded), tmp_path / "train.parquet")
    said = unused_note(*loaded(tmp_path))
    assert said is not None
    assert said.startswith("train: 1 of 3 rows have values that the task does not use: ")
    assert "messages[].tool_calls[].foo (1)" in said
    assert "column note (1)" in said
    assert "weight" not in said


def test_only_the_first_rows_of_a_large_split_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "COUNTED_ROWS", 3)
    rows: list[Row] = [{**PAIR, "id": 1}] * 5 + [{**PAIR, "late": 1}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert unused_note(*loaded(path, "completion")) == (
        "train: 3 of the first 3 rows have values that the task does not use: column id (3), column late (0)"
    )


def test_many_keys_are_abbreviated() -> None:
    said = note("chat", {"messages": [USER, calling(**{f"k{i}": 1 for i in range(50)})]})
    assert said is not None
    assert said.endswith(" and 30 more")
    assert said.count("messages[]") == 20


def test_equally_frequent_keys_are_sorted_by_name() -> None:
    said = note("chat", {"messages": [USER, calling(c=1, a=1, d=1, b=1)], "z": 1, "y": 1})
    assert said is not None
    listed = "".join(f", messages[].tool_calls[].{key} (1)" for key in "abcd")
    assert said.endswith(f"values that the task does not use: column y (1), column z (1){listed}")


DROPPED = "have messages after the last trained one; these are dropped"
OFF = {**REPLY, "train": False}


@pytest.mark.parametrize("name", ["chat", "auto"])
def test_messages_after_the_last_trained_one_are_counted(name: str) -> None:
    task = registry.task(name)
    rows = [
        {"messages": [USER, REPLY]},
        {"messages": [USER, REPLY, {**USER, "secret": 1, "name": "n", "weight": 0}]},
        {"messages": [USER, {**OFF, "mood": 1}, USER, REPLY, USER, {**OFF, "mood": 1}]},
        {"messages": [USER, {**REPLY, "mood": 1}]},
        {"messages": [USER]},
    ]
    listed = "messages[].mood (1), messages[].name (1), messages[].secret (1)"
    keys = f"train: 2 of 5 rows have values that the task does not use: {listed}"
    assert column_notes(task, task.Config(), split_of(*rows)) == [
        keys,
        f"train: 2 of 5 chats {DROPPED}",
    ]
    turns = {"conversations": [HUMAN, GPT, {**HUMAN, "x": 1}]}
    assert column_notes(task, task.Config(), split_of(turns))[1] == f"train: 1 of 1 chats {DROPPED}"


def test_a_stream_reports_dropped_messages_once() -> None:
    task = registry.task("chat")
    for head, later in [([USER, REPLY], 1), ([USER, REPLY, USER], 0)]:
        said: list[str] = []
        watch = ColumnWatch(task, task.Config(), split_of({"messages": head}), said.append)
        for _ in range(2):
            watch.see({"messages": [USER, REPLY, USER]})
        assert said == [f"train: further chats {DROPPED}"] * later


def test_a_stream_reports_later_keys_once() -> None:
    task = registry.task("chat")
    head = split_of({"messages": [USER, REPLY], "id": 1})
    config = task.Config()
    said: list[str] = []
    settle(task, config, head, said.append)
    assert said[-1].startswith("train: 1 of 1 rows have values that the task does not use")
    settle(task, config, replace(head, is_head=True), said.append)
    line = "train: 1 of the first 1 rows have values that the task does not use: column id (1)"
    assert said[-1] == line
    watch = ColumnWatch(task, config, head, said.append)
    watch.see({"messages": [USER, REPLY], "id": 2})
    watch.see(UnreadRow("not JSON"))
    assert said[-1] == line
    for _ in range(2):
        watch.see({"messages": [USER, calling(foo=1)], "id": 2, "bar": 1})
    listed = "column bar, messages[].tool_calls[].foo"
    assert said[-1] == f"train: further rows have values that the task does not use: {listed}"
    assert said.count(said[-1]) == 1


USER_TASK = """\
from lorakit.tasks.completion import Completion


class Mine(Completion):
    def example(self, row, config):
        row = dict(row, prompt=row["prompt"] + row["extra"])
        return super().example(row, config)
{more}
"""
SAYS = """
    def read_columns(self, config, columns):
        return ("prompt", "completion", "extra")
"""


@pytest.mark.parametrize(("more", "expected"), [("", None), (SAYS, "column other (1)")])
def test_a_user_task_declares_what_it_reads(
    more: str, expected: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USER_TASK.format(more=more))
    said = note(f"{file}:Mine", PAIR | {"extra": "x", "other": "y"})
    assert (said and said.partition(" values that the task does not use: ")[2]) == expected


def test_counts_are_in_the_order_of_the_labels() -> None:
    counts = label_counts(["b", "a", "never"], [1, 1, 0, 1])
    assert counts == {"b": 1, "a": 3, "never": 0}
    assert counts_line(counts) == "b 1, a 3, never 0"


def test_many_labels_are_abbreviated() -> None:
    counts = {f"intent-{n}": 1000 - n for n in range(150)} | {"rare": 1, "never": 0}
    line = counts_line(counts)
    assert line.startswith("152, most frequent intent-0 1,000, intent-1 999, ")
    assert line.endswith("least frequent intent-148 852, intent-149 851, rare 1; 1 unused")
    assert len(line) < 250


def test_similar_labels_are_reported_with_their_counts() -> None:
    counts = {"positive ": 3, "negative": 2, "Positive": 1, "no\u00a0idea": 1, "no idea": 1}
    assert similar_labels(counts) == [
        'warning: labels that differ only in case or whitespace are separate classes: "positive '
        '" (3 rows), "Positive" (1 row)',
        "warning: labels that differ only in case or whitespace are separate classes: "
        '"no\\xa0idea" (1 row), "no idea" (1 row)',
    ]
    assert similar_labels({"positive": 1, "negative": 1, "posi tive": 1}) == []
    many = {name: 1 for n in range(8) for name in (f"label{n}", f"Label{n}")}
    assert len(similar_labels(many)) == 6
    assert similar_labels(many)[-1] == "warning: 3 more such groups of labels"
    assert '"positive "' in counts_line(counts)
