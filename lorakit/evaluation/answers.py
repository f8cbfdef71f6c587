"""Generated turns of chats -> their contents, as the chat template writes those."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.data.chat import around_answer
from lorakit.data.chat.template import PAYLOAD, ChatTemplate
from lorakit.data.chat.turns import TurnReader, content_text
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

    A text that is what the row's turn is trained as is the content of that turn, whatever the
    template makes of it (upper case, escaped characters). Of other texts only the fixed text goes
    that the template writes before or behind each answer, such as an empty ``<think>`` block.
    """
    found = []
    trained = _TrainedTexts(tokenizer)
    for row, text in zip(rows, texts, strict=True):
        prompt = task.prompt(split.rows[row], config)
        if isinstance(prompt, ChatExample):
            content = trained.content(prompt, task.example(split.rows[row], config), text)
            if content is None:
                before, behind = around_answer(prompt.messages, tokenizer, prompt.tools)
                content = _without(text, before, behind)
            text = content
        found.append(text)
    return found


class _TrainedTexts:
    """Recognises what a turn is trained as."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._reader: TurnReader | None = None

    def content(self, prompt: ChatExample, example: Any, text: str) -> str | None:
        """The content of the turn that answers ``prompt`` in ``example``, if ``text`` is that turn
        as the template renders it, white space at both ends and special tokens aside. None also
        where the template renders the content as it stands."""
        index = len(prompt.messages)
        if not isinstance(example, ChatExample) or len(example.messages) != index + 1:
            return None
        content = content_text(example.messages[index])
        if not content.strip() or any(example.messages[index].get(key) for key in PAYLOAD):
            return None
        if self._reader is None:
            self._reader = TurnReader(ChatTemplate(self._tokenizer))
        turn = self._reader.read(example.messages, example.tools, index)
        answer = self._reader.template.special.sub("", turn.answer).strip()
        return content if text.strip() == answer != content.strip() else None


def _without(text: str, before: str, behind: str) -> str:
    head, tail = before.strip(), behind.strip()
    if head and text.lstrip().startswith(head):
        text = text.lstrip()[len(head) :].lstrip()
    if tail and text.rstrip().endswith(tail):
        text = text.rstrip()[: -len(tail)].rstrip()
    return text
