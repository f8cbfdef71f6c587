"""What a task makes of a row, before any token exists."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Messages ``{"role", "content"}``; the tokenizer's chat template renders them and the loss is
    on the assistant's turns."""

    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class ClassificationExample:
    """A text or a pair of texts; ``label`` is a class index, or a float for regression."""

    text: str
    text_pair: str | None
    label: int | float


Example = TextExample | ChatExample | ClassificationExample
