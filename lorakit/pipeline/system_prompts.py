"""The system prompts of the chats that an adapter was trained on: a chat with it uses them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.adapters.load import is_adapter
from lorakit.adapters.peft.read import read_sidecar
from lorakit.data.examples import ChatExample
from lorakit.data.rows import UnreadRow, row_range
from lorakit.data.sources import Split
from lorakit.errors import DataError
from lorakit.tasks.base import Task

#: The rows that are looked at, and how many different prompts are kept.
_ROWS, _PROMPTS = 1000, 5
_SYSTEM = ("system", "developer")


def system_prompts(task: Task, config: Any, split: Split) -> list[str]:
    """Return the different system prompts of a split's first chats, the empty string for chats
    without one; an empty list if the rows are not chats."""
    found: dict[str, None] = {}
    for row in row_range(split.rows, 0, min(len(split), _ROWS)):
        if isinstance(row, UnreadRow):
            continue
        try:
            example = task.example(row, config)
        except DataError:  # a bad row, which training skips
            continue
        if not isinstance(example, ChatExample):
            return []
        found[_system_prompt(example.messages[0])] = None
        if len(found) == _PROMPTS:
            break
    return list(found)


def trained_system_prompts(model: str | Path, adapter: str | Path | None = None) -> list[str]:
    """Return what ``system_prompts`` found in the training data of ``adapter``, or of ``model`` if
    it is an adapter directory; an empty list if that is unknown."""
    if adapter is None and is_adapter(model):
        adapter = model
    return [] if adapter is None else read_sidecar(adapter).get("system_prompts") or []


def _system_prompt(message: Mapping[str, Any]) -> str:
    return str(message.get("content") or "") if message["role"] in _SYSTEM else ""
