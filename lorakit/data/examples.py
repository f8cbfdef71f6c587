"""Examples: what a task makes of a row, before it is tokenised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Segment:
    """A stretch of text; the loss is taken on it only if ``trained``."""

    text: str
    trained: bool


@dataclass(frozen=True)
class TextExample:
    """Segments in order, tokenised one by one so that a prompt reads alike in training and in
    generation; ``eos`` appends the end token, trained like the last segment."""

    segments: tuple[Segment, ...]
    eos: bool = True


@dataclass(frozen=True)
class ChatExample:
    """A chat that the tokenizer's chat template renders.

    ``messages`` are what the template receives: ``role``, ``content`` and any further key it may
    read. ``trained`` has one flag per message, true for the assistant turns that the loss is taken
    on; None trains all of them. ``tools`` is passed to the template (OpenAI's JSON schemas).
    """

    messages: tuple[Mapping[str, Any], ...]
    trained: tuple[bool, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None

    def is_trained(self, index: int) -> bool:
        """Whether the loss is taken on message ``index``."""
        if self.trained is not None:
            return self.trained[index]
        return bool(self.messages[index]["role"] == "assistant")


@dataclass(frozen=True)
class ClassificationExample:
    """A text or a pair of texts; ``label`` is a class index, or a float for regression."""

    text: str
    text_pair: str | None
    label: int | float


Example = TextExample | ChatExample | ClassificationExample
