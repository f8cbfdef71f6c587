"""Which task the columns of a file suggest, and the keys that name its columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.sources import load_split
from lorakit.errors import DataError
from lorakit.first_recipe.choose import Choice, Given, choose_task
from lorakit.first_recipe.columns import describe_columns

MESSAGE = {"role": "user", "content": "Hi"}
TURN = {"from": "human", "value": "Hi"}
LONG = "A sentence that is a good deal longer than the name of a class"


def chosen(folder: Path, row: dict[str, Any], wanted: str | None = None, **given: Any) -> Choice:
    """The choice for 40 rows: lists under ``row`` that are tuples give the values in turn."""
    rows = [
        {name: v[i % len(v)] if isinstance(v, tuple) else v for name, v in row.items()}
        for i in range(40)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = load_split(str(file), "train")
    assert split is not None
    return choose_task(describe_columns(split), Given(**given), "rows.jsonl", wanted)


TEXTS = tuple(f"{LONG} {number}" for number in range(40))
FLOATS = tuple(number / 7 for number in range(40))


@pytest.mark.parametrize(
    ("row", "task", "keys"),
    [
        ({"messages": [MESSAGE]}, "chat", {}),
        ({"messages": json.dumps([MESSAGE])}, "chat", {}),
        ({"conversations": [TURN], "id": TEXTS}, "chat", {}),
        ({"dialog": [MESSAGE]}, "chat", {"messages_column": "dialog"}),
        ({"messages": [MESSAGE], "prompt": TEXTS, "completion": TEXTS}, "chat", {"format": "messages"}),
        ({"prompt": [MESSAGE], "completion": [MESSAGE]}, "chat", {}),
        ({"prompt": TEXTS, "completion": TEXTS}, "completion", {}),
        ({"instruction": TEXTS, "input": "", "output": TEXTS}, "completion", {}),
        ({"instruction": TEXTS, "output": TEXTS, "history": [["a", "b"]]}, "chat", {}),
        (
            {"Question": TEXTS, "Answer": TEXTS},
            "completion",
            {"template": "Question: {Question}\nAnswer:", "completion_template": " {Answer}"},
        ),
        ({"text": TEXTS, "label": (0, 1)}, "classification", {}),
        (
            {"review": TEXTS, "sentiment": ("good", "bad"), "id": tuple(range(40))},
            "classification",
            {"text_column": "review", "label_column": "sentiment"},
        ),
        (
            {"premise": TEXTS, "hypothesis": TEXTS, "label": (0, 1, 2)},
            "classification",
            {"text_column": "premise", "text_pair_column": "hypothesis"},
        ),
        ({"text": TEXTS, "kind": ("a", "b", "c")}, "classification", {"label_column": "kind"}),
        ({"text": TEXTS, "labels": (["a"], ["a", "b"], [])}, "classification",
         {"label_column": "labels", "multi_label": True}),
        ({"text": TEXTS, "toxic": (0, 1), "spam": (1, 1, 0)}, "classification",
         {"label_columns": ["toxic", "spam"]}),
        ({"text": TEXTS, "score": FLOATS}, "classification",
         {"label_column": "score", "regression": True}),
        ({"tokens": ["a", "b"], "tags": ["O", "B-X"]}, "token_classification", {}),
        ({"words": ["a", "b"], "ner_tags": [0, 1]}, "token_classification",
         {"tokens_column": "words", "tags_column": "ner_tags"}),
        ({"text": TEXTS}, "text", {}),
        ({"body": TEXTS, "url": "x"}, "text", {"text_column": "body"}),
        ({"meaning_representation": "a[b]", "human_reference": TEXTS}, "e2e_nlg", {}),
        ({"question": TEXTS, "table_id": "1", "sql": {"sel": 0}}, "wikisql", {}),
    ],
)  # fmt: skip
def test_the_columns_choose_the_task(
    row: dict[str, Any], task: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    found = chosen(tmp_path, row)
    assert (found.task, found.keys) == (task, keys)


def test_an_instruct_model_reads_instructions_as_chats(tmp_path: Path) -> None:
    row = {"instruction": TEXTS, "output": TEXTS}
    assert chosen(tmp_path, row, has_chat_template=True).task == "chat"
    assert chosen(tmp_path, row, "completion", has_chat_template=True).task == "completion"


def test_an_encoder_is_not_offered_a_task_of_language_models(tmp_path: Path) -> None:
    row = {"prompt": TEXTS, "completion": ("yes", "no"), "text": TEXTS, "label": (0, 1)}
    assert chosen(tmp_path, row).task == "completion"
    assert chosen(tmp_path, row, kinds=("encoder",)).task == "classification"
    with pytest.raises(DataError, match=r"fit no task for the model, an encoder; allowed: class"):
        chosen(tmp_path, {"prompt": TEXTS, "completion": TEXTS}, kinds=("encoder",))


@pytest.mark.parametrize(
    ("row", "wanted", "said"),
    [
        (
            {"a": TEXTS, "b": TEXTS},
            None,
            ["'a', 'b' fit no task", "chat (messages or", "tokens, tags"],
        ),
        ({"x": FLOATS}, None, ["'x' fit no task", "classification (a text or two, and a label)"]),
        ({"a": TEXTS}, "chat", ["--task chat, which needs messages or", "hint: --set task."]),
        ({"id;text": TEXTS}, None, ["the only column is 'id;text'", "separated by commas"]),
        ({"text": TEXTS}, "classification", ["which needs a text or two, and a label"]),
        ({"text": TEXTS}, "glue/sst2", ["--task glue/sst2, which needs sentence, label"]),
    ],
)
def test_what_does_not_fit_names_the_columns_and_what_is_needed(
    row: dict[str, Any], wanted: str | None, said: list[str], tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        chosen(tmp_path, row, wanted)
    message = str(error.value)
    assert message.startswith("--data rows.jsonl: the ")
    assert "\n" not in message
    for part in said:
        assert part in message


def test_keys_that_are_given_name_the_columns(tmp_path: Path) -> None:
    row = {"a": TEXTS, "b": TEXTS, "c": tuple(str(i % 30) for i in range(40))}
    keys = {"text_column": "b", "label_column": "c"}
    found = chosen(tmp_path, row, "classification", keys=keys)
    assert (found.task, found.keys["label_column"]) == ("classification", "c")
