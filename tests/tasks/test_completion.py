"""``completion``: templates, which substitute whole columns and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lorakit import registry
from lorakit.errors import DataError
from lorakit.tasks.completion import fill, template_columns

COMPLETION = registry.task("completion")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Question: {q}\nAnswer:", "Question: a {b}\nAnswer:"),
        ("{{q}} {q}{n}", "{q} a {b}7"),
        ("{my column}|{x.y}|{f}", "c|d|0.5"),
        ("plain", "plain"),
        ("{{{n}}}", "{7}"),
    ],
)
def test_fill(template: str, expected: str) -> None:
    row = {"q": "a {b}", "n": 7, "my column": "c", "x.y": "d", "f": 0.5}
    assert fill(template, row) == expected


def test_columns_are_listed_once() -> None:
    assert template_columns("{b}{a}{{c}}{b}") == ("b", "a")


@pytest.mark.parametrize("value", [True, ["a"], {"a": 1}])
def test_values_that_are_not_text_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match="column 'a' ="):
        fill("{a}", {"a": value})


def test_a_missing_value_is_empty() -> None:
    assert fill("{a}{b} {c}", {"a": None, "c": "x"}) == " x"


@pytest.mark.parametrize("template", ["{", "a}", "{}", "{ }", "{{a}", "{a}}", "{a{b}}", ""])
def test_invalid_braces_are_refused(template: str) -> None:
    with pytest.raises(ValidationError):
        COMPLETION.Config(template=template)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"question": "2+2?", "answer": 4}) + "\n", encoding="utf-8")
    return str(file)


def test_templates_read_any_columns(rows: str) -> None:
    config = COMPLETION.Config(
        path=rows, template="Question: {question}\nAnswer:", completion_template=" {answer}"
    )
    found = COMPLETION.load(config, "train")
    built = COMPLETION.example(found.rows[0], config)
    assert [(s.text, s.trained) for s in built.segments] == [
        ("Question: 2+2?\nAnswer:", False),
        (" 4", True),
    ]
    assert COMPLETION.prompt(found.rows[0], config).segments == built.segments[:1]
    assert COMPLETION.metrics(["4"], found, config) == {"exact_match": 1.0}
    assert COMPLETION.notes(config, found) == []


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{qestion}", "no column 'qestion' (did you mean 'question'?); the columns are 'question'"),
        ("{question.x}", "attributes, indices and formats are not supported"),
        ("{question[0]}", "attributes, indices and formats are not supported"),
        ("{question!r}", "attributes, indices and formats are not supported"),
        ("{answer:>5}", "attributes, indices and formats are not supported"),
    ],
)
def test_an_unknown_column_is_refused(rows: str, template: str, expected: str) -> None:
    config = COMPLETION.Config(path=rows, template=template, completion_template="{answer}")
    with pytest.raises(DataError) as caught:
        COMPLETION.load(config, "train")
    start = f"task.template = {json.dumps(template)}: {rows}: no column "
    assert str(caught.value).startswith(start)
    assert expected in str(caught.value)


def test_a_template_and_a_column_combine(rows: str) -> None:
    config = COMPLETION.Config(path=rows, template="{question}", completion_column="answer")
    found = COMPLETION.load(config, "train")
    with pytest.raises(DataError, match="column 'answer' = 4; allowed: text"):
        COMPLETION.example(found.rows[0], config)
    config = COMPLETION.Config(path=rows, template="{question}")
    with pytest.raises(DataError, match="no column 'completion'"):
        COMPLETION.load(config, "train")
