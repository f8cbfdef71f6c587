"""``e2e_nlg``: a restaurant's meaning representation -> a sentence (Novikova et al. 2017).

A row as text, the loss on what follows ``text:`` and on its EOS::

    name[The Vaults], eatType[pub], near[Café Adriatic]
    text: The Vaults is a pub near Café Adriatic.
"""

from __future__ import annotations

from typing import Any

from lorakit.data.examples import Segment, TextExample
from lorakit.errors import DataError
from lorakit.recipe.sections import TaskSection, Text
from lorakit.tasks.base import Row, Task

_SOURCE, _TARGET = "meaning_representation", "human_reference"


class E2eNlgConfig(TaskSection):
    """No keys of its own. ``path`` is required; the columns are ``meaning_representation`` and
    ``human_reference``."""

    name: Text = "e2e_nlg"


class E2eNlg(Task):
    names = ("e2e_nlg",)
    summary = "E2E NLG challenge: a meaning representation -> a sentence"
    Config = E2eNlgConfig
    kind = "causal"

    def columns(self, config: Any) -> tuple[str, ...]:
        return (_SOURCE, _TARGET)

    def example(self, row: Row, config: Any) -> TextExample:
        reference = _text(row, _TARGET)
        return TextExample(
            (Segment(_prompt(row), trained=False), Segment(f" {reference}", trained=True))
        )

    def prompt(self, row: Row, config: Any) -> TextExample:
        return TextExample((Segment(_prompt(row), trained=False),), eos=False)


def _prompt(row: Row) -> str:
    return f"{_text(row, _SOURCE)}\ntext:"


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"column {column!r} holds {value!r}; allowed: text, not empty")
    return " ".join(value.split())


TASK = E2eNlg()
