"""``completion``: a prompt and its completion, loss only on the completion and its EOS."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, model_validator

from lorakit.data.examples import Segment, TextExample
from lorakit.data.sources import Split
from lorakit.errors import DataError, did_you_mean, shown
from lorakit.recipe.sections import Text
from lorakit.tasks.base import (
    GenerationSection,
    Prediction,
    Row,
    exact_match,
    exclusive,
    is_empty,
    optional_text,
    paired,
    required_text,
)
from lorakit.tasks.formats import FormattedTask

# The prompt of Stanford Alpaca (Taori et al. 2023, train.py, PROMPT_DICT).
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


@lru_cache(maxsize=64)
def _pieces(template: str) -> tuple[tuple[str, bool], ...]:
    """(text, False) and (column, True) pairs. Raises ValueError for an unbalanced brace and for
    empty braces."""
    pieces = []
    for match in _PIECE.finditer(template):
        text, column = match.group(), match.group(1)
        if column is not None:
            if not column.strip():
                raise ValueError("empty {}; write a column's name, or {{}} for literal braces")
            pieces.append((column, True))
        elif text in ("{", "}"):
            raise ValueError(f"unbalanced {text!r}; write {text * 2!r} for a literal brace")
        else:
            pieces.append((text[:1] if text in ("{{", "}}") else text, False))
    return tuple(pieces)


def _valid(template: str) -> str:
    _pieces(template)
    return template


#: Text with ``{column}`` in it; ``{{`` and ``}}`` are literal braces. Only whole column names are
#: substituted: the attributes, indices and formats of ``str.format`` are not supported.
TemplateText = Annotated[Text, AfterValidator(_valid)]


class CompletionConfig(GenerationSection):
    """The keys of ``completion``. ``alpaca`` is the original Alpaca prompt, whose first sentences a
    row's ``system`` replaces; in ``prompt_completion`` it precedes the prompt, separated by an
    empty line. ``history`` and ``tools`` need ``task.name: chat``.

    Templates look like ``"Question: {question}\\nAnswer:"`` and ``" {answer}"``. A column that a
    row lacks is empty there.
    """

    name: Text = "completion"
    format: Literal["auto", "prompt_completion", "alpaca"] = "auto"
    """The format of the rows; auto recognizes it by the columns: prompt_completion (prompt,
    completion) or alpaca (instruction, input, output)."""
    prompt_column: Text | None = None
    """The column of the prompt, if it has another name."""
    completion_column: Text | None = None
    """The column of the completion, if it has another name."""
    template: TemplateText | None = None
    """The prompt as text with {column} in it, instead of prompt_column."""
    completion_template: TemplateText | None = None
    """The completion as text with {column} in it, instead of completion_column."""
    train_on: Literal["completion", "prompt_and_completion"] = "completion"
    """Train the completion, or the prompt too."""
    stop: list[Text] = []
    """Stop sequences: generated text ends before the first of them."""
    dataset_name: Text | None = None
    """A dataset on the Hub, read if path is null."""
    dataset_config_name: Text | None = None
    """The configuration of the dataset on the Hub."""

    @model_validator(mode="after")
    def _one_source(self) -> CompletionConfig:
        pairs = (("prompt_column", "template"), ("completion_column", "completion_template"))
        for column, template in pairs:
            if getattr(self, column) and getattr(self, template):
                raise exclusive(column, template)
        keys = ("prompt_column", "template", "completion_column", "completion_template")
        given = [key for key in keys if getattr(self, key)]
        if given and self.format == "alpaca":
            raise exclusive("format: alpaca", given[0])
        return self


class Completion(FormattedTask):
    names = ("completion",)
    summary = "completion of a prompt; exact match"
    Config = CompletionConfig
    kind = "causal"
    formats = ("prompt_completion", "alpaca")
    column_keys = "task.prompt_column and task.completion_column, or task.template"
    refused = ("history", "tools")

    def named_columns(self, config: Any) -> tuple[str, ...]:
        if not any((config.prompt_column, config.template, config.completion_column,
                    config.completion_template)):  # fmt: skip
            return ()
        return tuple(dict.fromkeys((*self._plain_columns(config), *self.template_columns(config))))

    def columns(self, config: Any) -> tuple[str, ...]:
        if self.named_columns(config):
            return self._plain_columns(config)
        return super().columns(config)

    def template_columns(self, config: Any) -> tuple[str, ...]:
        templates = [text for text in (config.template, config.completion_template) if text]
        return tuple(dict.fromkeys(name for text in templates for name in template_columns(text)))

    def _plain_columns(self, config: Any) -> tuple[str, ...]:
        """The named columns outside templates, which every row must have."""
        prompt = () if config.template else (config.prompt_column or "prompt",)
        if config.completion_template:
            return prompt
        return (*prompt, config.completion_column or "completion")

    def check_columns(self, split: Split, config: Any) -> None:
        for key in ("template", "completion_template"):
            if text := getattr(config, key):
                cause = f"task.{key} = {shown(text)}: {split.source_read}"
                check_template(text, cause, split.columns)
        super().check_columns(split, config)

    def example(self, row: Row, config: Any) -> TextExample:
        completion = self.completion(row, config)
        if not completion.strip():
            alpaca = self._is_alpaca(row, config)
            column = "output" if alpaca else config.completion_column or "completion"
            raise DataError(f"column {column!r} is empty: nothing to train on")
        prompt = Segment(self._prompt(row, config), trained=False)
        train_all = config.train_on == "prompt_and_completion"
        return TextExample((prompt, Segment(completion, trained=True)), train_all=train_all)

    def prompt(self, row: Row, config: Any) -> TextExample:
        return TextExample((Segment(self._prompt(row, config), trained=False),), eos=False)

    def completion(self, row: Row, config: Any) -> str:
        """The reference completion of a row. Raises DataError if it is not text."""
        if config.completion_template:
            return _filled("completion_template", config, row)
        if self._is_alpaca(row, config):
            return required_text(row, "output")
        return _text(row, config.completion_column or "completion")

    def stop_texts(self, config: Any) -> tuple[str, ...]:
        return tuple(config.stop)

    def main_metric(self, config: Any) -> str:
        return "exact_match" if self.generates(config) else "loss"

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """``exact_match`` with each row's completion."""
        pairs = paired(predictions, split, lambda row: self.completion(row, config))
        return {"exact_match": exact_match(*pairs)}

    def _prompt(self, row: Row, config: Any) -> str:
        if config.template:
            return _filled("template", config, row)
        if self.named_columns(config):
            return _text(row, config.prompt_column or "prompt")
        self._check_single_turn(row)
        if self._is_alpaca(row, config):
            return _alpaca_prompt(row)
        prompt, system = _text(row, "prompt"), optional_text(row, "system")
        return f"{system}\n\n{prompt}" if system else prompt

    def _check_single_turn(self, row: Row) -> None:
        for column in self.refused:
            if not is_empty(row.get(column)) and row[column] != "[]":
                raise DataError(
                    f"column {column!r} = {shown(row[column])}; allowed: empty, or "
                    f"task.name: chat, which reads {column}"
                )

    def _is_alpaca(self, row: Row, config: Any) -> bool:
        named = self.named_columns(config)
        return not named and self.format_of(tuple(row), config).name == "alpaca"


def _text(row: Row, column: str) -> str:
    """The column's text. Raises DataError for anything else."""
    if isinstance(value := row.get(column), list):
        raise DataError(
            f"column {column!r} = {shown(value)}; allowed: text, or task.name: chat, which reads "
            "lists of messages"
        )
    return required_text(row, column)


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a template names, without duplicates."""
    return tuple(dict.fromkeys(text for text, is_column in _pieces(template) if is_column))


def check_template(template: str, cause: str, columns: Sequence[str]) -> None:
    """Raise DataError, suggesting the closest name, for a column that does not exist. The message
    starts with ``cause``, the key and the file."""
    for name in template_columns(template):
        if name not in columns:
            message = did_you_mean(f"{cause}: no column {name!r}", name, columns)
            if re.search(r"[.\[!:]", name):
                message += "; attributes, indices and formats are not supported in a template"
            raise DataError(f"{message}; the columns are {', '.join(map(repr, columns))}")


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Fill in a template. Numbers are formatted by Python's ``str``; a missing or null value is
    empty. Raises DataError for a value that is neither text nor a number."""
    return "".join(
        _value(text, row.get(text)) if is_column else text for text, is_column in _pieces(template)
    )


def _value(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    allowed = "text or a number, in a template"
    raise DataError(f"column {column!r} = {shown(value)}; allowed: {allowed}")


def _filled(key: str, config: Any, row: Row) -> str:
    text = fill(getattr(config, key), row)
    if not text.strip():
        reason = "" if key == "template" else ": nothing to train on"
        raise DataError(f"the text of task.{key} is empty{reason}")
    return text


def _alpaca_prompt(row: Row) -> str:
    instruction, given = required_text(row, "instruction"), optional_text(row, "input")
    first = optional_text(row, "system") or (_WITH_INPUT if given else _WITHOUT_INPUT)
    middle = f"### Input:\n{given}\n\n" if given else ""
    return f"{first}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:"


TASK = Completion()
