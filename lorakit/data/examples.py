"""Examples: what a task builds from a row, before it is tokenized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: What the labels of an encoder's rows are, as transformers names it.
Problem = Literal[
    "regression",
    "single_label_classification",
    "multi_label_classification",
    "token_classification",
]


@dataclass(frozen=True)
class Segment:
    """A piece of text, which counts in the loss only if it is ``trained``."""

    text: str
    trained: bool


@dataclass(frozen=True)
class TextExample:
    """Segments in order. They are tokenized separately, so that a prompt has the same tokens in
    training and in generation. ``eos`` appends the EOS token, trained like the last segment. With
    ``train_all``, all segments are trained; the flags still say which are the prompt, whose
    beginning a long row loses. If it ``splits``, a long text becomes several rows instead."""

    segments: tuple[Segment, ...]
    eos: bool = True
    train_all: bool = False
    splits: bool = False


@dataclass(frozen=True)
class ChatExample:
    """A chat for the tokenizer's chat template.

    ``messages`` are passed to the template: ``role``, ``content`` and any further keys. ``trained``
    has one flag per message, true for the assistant turns that count in the loss; None trains all
    of them. ``tools`` (JSON schemas as OpenAI defines them) is passed to the template too. With
    ``train_all``, all tokens of the rendered chat count. ``weights`` are those of the messages'
    tokens in the loss, above 0; None weights all of them equally. ``mask_reasoning`` excludes the
    text of the assistant's reasoning from the loss.
    """

    messages: tuple[Mapping[str, Any], ...]
    trained: tuple[bool, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    train_all: bool = False
    weights: tuple[float, ...] | None = None
    mask_reasoning: bool = False

    def is_trained(self, index: int) -> bool:
        """Whether message ``index`` counts in the loss."""
        if self.trained is not None:
            return self.trained[index]
        return bool(self.messages[index]["role"] == "assistant")


@dataclass(frozen=True)
class ClassificationExample:
    """A text or a pair of texts; ``label`` is a class index, a float for regression, or for several
    labels per row a 0 or 1 for each class."""

    text: str
    text_pair: str | None
    label: int | float | tuple[int, ...]


@dataclass(frozen=True)
class WordsExample(ClassificationExample):
    """A text of ``words``, joined by spaces; ``label`` has the class index of each word."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, words: tuple[str, ...], labels: tuple[int, ...]) -> WordsExample:
        return cls(" ".join(words), None, labels, words)


Example = TextExample | ChatExample | ClassificationExample
