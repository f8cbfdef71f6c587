"""Generated turns of chats -> their contents, without what the chat template writes around them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.data.chat import around_answer
from lorakit.data.examples import ChatExample
from lorakit.data.sources import Split
from lorakit.tasks.base import Prediction, Task


def contents(
    task: Task,
    config: Any,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[int],
    texts: list[Prediction],
) -> list[Prediction]:
    """The generated ``texts`` of ``rows`` as they compare with a row's text.

    A model that is trained to write an empty ``<think>`` block, or any other fixed text of the
    template, before or behind each answer writes it here too. Other texts stay as they are.
    """
    found = []
    for row, text in zip(rows, texts, strict=True):
        example = task.prompt(split.rows[row], config)
        if isinstance(example, ChatExample):
            before, behind = around_answer(example.messages, tokenizer, example.tools)
            text = _without(text, before, behind)
        found.append(text)
    return found


def _without(text: str, before: str, behind: str) -> str:
    head, tail = before.strip(), behind.strip()
    if head and text.lstrip().startswith(head):
        text = text.lstrip()[len(head) :].lstrip()
    if tail and text.rstrip().endswith(tail):
        text = text.rstrip()[: -len(tail)].rstrip()
    return text
