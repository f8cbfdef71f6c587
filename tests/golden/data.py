"""The data of the golden runs: a few short rows per directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tasks.wikisql_files import write_database

Row = dict[str, Any]

_THINGS = ("kettle", "ladder", "lamp", "anchor", "basket", "drum", "bell")
_PLACES = ("attic", "harbour", "yard", "mill", "porch")
_TABLE = {
    "id": "1-20-3",
    "header": ["Ship", "Crew", "Port"],
    "types": ["text", "real", "text"],
    "rows": [["Heron", 12, "Oban"], ["Tern", 7, "Wick"], ["Gull", 12, "Wick"]],
}


def _completion(i: int) -> Row:
    thing, place = _THINGS[i % 7], _PLACES[i % 5]
    return {"prompt": f"Where is the {thing}?", "completion": f" In the {place}" + "." * (i % 3)}


def _text(i: int) -> Row:
    return {"text": " and ".join(f"a {_THINGS[(i + k) % 7]}" for k in range(i % 3 + 1))}


def _chat(i: int) -> Row:
    messages = [
        {"role": "user", "content": f"Fetch the {_THINGS[i % 7]}."},
        {"role": "assistant", "content": f"From the {_PLACES[i % 5]}?"},
        {"role": "user", "content": "Yes." if i % 2 else "No, leave it."},
        {"role": "assistant", "content": "Done." if i % 2 else "As you like."},
    ]
    return {"messages": messages[: 2 + 2 * (i % 2)]}


def _classification(i: int) -> Row:
    label = ("indoors", "outdoors", "unknown")[i % 3]
    return {"text": f"the {_THINGS[i % 7]} is by the {_PLACES[i % 5]}", "label": label}


def _regression(i: int) -> Row:
    one, other = f"a {_THINGS[i % 7]}", f"one {_THINGS[i * 3 % 7]}"
    return {"sentence1": one, "sentence2": other, "label": 0.5 * (i * 7 % 11)}


def _e2e_nlg(i: int) -> Row:
    name, near = _PLACES[i % 5].title(), _PLACES[(i + 1) % 5]
    return {
        "meaning_representation": f"name[{name}], near[{near}]",
        "human_reference": f"{name} is near the {near}" + (", up the hill." if i % 2 else "."),
    }


def _wikisql(i: int) -> Row:
    ship, crew, port = _TABLE["rows"][i % 3]  # type: ignore[misc]
    if i % 2:
        question, sql = f"Which ships lie in {port}?", {"sel": 0, "agg": 0, "conds": [[2, 0, port]]}
    else:
        question, sql = (
            f"How many ships have {crew}?",
            {"sel": 0, "agg": 3, "conds": [[1, 0, crew]]},
        )
    return {"table_id": _TABLE["id"], "question": f"{question} ({ship})", "sql": sql}


_ROWS: dict[str, Callable[[int], Row]] = {
    "completion": _completion,
    "text": _text,
    "chat": _chat,
    "classification": _classification,
    "regression": _regression,
    "e2e_nlg": _e2e_nlg,
    "wikisql": _wikisql,
}
_TRAIN_ROWS, _VALIDATION_ROWS = 18, 5


def write_data(folder: Path) -> None:
    """Write ``folder/NAME`` for each dataset, with ``train`` and ``validation``."""
    for name, row in _ROWS.items():
        rows = [row(i) for i in range(_TRAIN_ROWS + _VALIDATION_ROWS)]
        write_lines(folder / name / "train.jsonl", rows[:_TRAIN_ROWS])
        write_lines(folder / name / "validation.jsonl", rows[_TRAIN_ROWS:])
    for split in ("train", "validation"):
        write_lines(folder / "wikisql" / f"{split}.tables.jsonl", [_TABLE])
        write_database(folder / "wikisql" / f"{split}.db", _TABLE)


def write_lines(file: Path, rows: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
