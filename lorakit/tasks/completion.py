"""``completion``: prompt and completion; the loss is on the completion and its EOS only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import model_validator

from lorakit.data.examples import Segment, TextExample
from lorakit.data.sources import Split
from lorakit.errors import DataError, shown
from lorakit.recipe.sections import Text
from lorakit.tasks.base import GenerationSection, Prediction, Row, exact_matches
from lorakit.tasks.formats import FormattedTask, TemplateText, fill, template_columns
from lorakit.tasks.formats import check_template as check_columns
from lorakit.tasks.messages import holds_something
from lorakit.tasks.turns import optional_text, required_text

# The words of Stanford Alpaca (Taori et al. 2023, train.py, PROMPT_DICT).
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


class CompletionConfig(GenerationSection):
    """``format`` is the rows' shape, ``auto`` from their columns: ``prompt_completion``, or
    ``alpaca`` (``instruction``, ``input``, ``output``) in the original Alpaca prompt. A row's own
    ``system`` stands in place of the first sentences there, and before the prompt, with an empty
    line between, in ``prompt_completion``. ``history`` and ``tools`` need ``task.name: chat``.

    Columns of your own: ``prompt_column`` and ``completion_column`` name them, or ``template`` and
    ``completion_template`` make the texts of them: ``"Question: {question}\\nAnswer:"`` and
    ``" {answer}"``, empty where a row lacks the column. ``stop`` are texts before which a
    generation ends. ``dataset_name`` and ``dataset_config_name`` are a Hub data set, read when
    ``path`` is null.
    """

    name: Text = "completion"
    format: Literal["auto", "prompt_completion", "alpaca"] = "auto"
    prompt_column: Text | None = None
    completion_column: Text | None = None
    template: TemplateText | None = None
    completion_template: TemplateText | None = None
    stop: list[Text] = []
    dataset_name: Text | None = None
    dataset_config_name: Text | None = None

    @model_validator(mode="after")
    def _one_way_to_read(self) -> CompletionConfig:
        own = {
            key: getattr(self, key)
            for key in ("prompt_column", "template", "completion_column", "completion_template")
        }
        for column, template in (
            ("prompt_column", "template"),
            ("completion_column", "completion_template"),
        ):
            if own[column] and own[template]:
                raise ValueError(f"{column} and {template} contradict each other; give one")
        given = [key for key, value in own.items() if value]
        if given and self.format == "alpaca":
            raise ValueError(f"format: alpaca and {given[0]} contradict each other; give one")
        return self


class Completion(FormattedTask):
    names = ("completion",)
    summary = "prompt -> completion, loss on the completion and its EOS; exact match"
    Config = CompletionConfig
    kind = "causal"
    formats = ("prompt_completion", "alpaca")
    column_keys = "task.prompt_column and task.completion_column, or task.template"
    refused = ("history", "tools")

    def own_columns(self, config: Any) -> tuple[str, ...]:
        if not any((config.prompt_column, config.template, config.completion_column,
                    config.completion_template)):  # fmt: skip
            return ()
        named = (*self._named_columns(config), *self.template_columns(config))
        return tuple(dict.fromkeys(named))

    def columns(self, config: Any) -> tuple[str, ...]:
        if self.own_columns(config):
            return self._named_columns(config)
        return super().columns(config)

    def template_columns(self, config: Any) -> tuple[str, ...]:
        texts = [text for text in (config.template, config.completion_template) if text]
        return tuple(dict.fromkeys(name for text in texts for name in template_columns(text)))

    def _named_columns(self, config: Any) -> tuple[str, ...]:
        prompt = () if config.template else (config.prompt_column or "prompt",)
        if config.completion_template:
            return prompt
        return (*prompt, config.completion_column or "completion")

    def check_columns(self, split: Split, config: Any) -> None:
        for key in ("template", "completion_template"):
            if text := getattr(config, key):
                try:
                    check_columns(text, f"task.{key}", split.columns)
                except DataError as error:
                    raise DataError(f"{split.source_read}: {error}") from error
        super().check_columns(split, config)

    def example(self, row: Row, config: Any) -> TextExample:
        completion = self.completion(row, config)
        if not completion.strip():
            alpaca = self._is_alpaca(row, config)
            column = "output" if alpaca else config.completion_column or "completion"
            raise DataError(f"column {column!r} is empty: nothing to train on")
        return TextExample(
            (Segment(self._prompt(row, config), trained=False), Segment(completion, trained=True))
        )

    def prompt(self, row: Row, config: Any) -> TextExample:
        return TextExample((Segment(self._prompt(row, config), trained=False),), eos=False)

    def stop_texts(self, config: Any) -> tuple[str, ...]:
        return tuple(config.stop)

    def main_metric(self, config: Any) -> str:
        return "exact_match" if self.generates(config) else "loss"

    def metrics(
        self, predictions: Sequence[Prediction], split: Split, config: Any
    ) -> dict[str, float]:
        """``exact_match`` with the row's completion."""
        return exact_matches(predictions, split, lambda row: self.completion(row, config))

    def _prompt(self, row: Row, config: Any) -> str:
        if config.template:
            return _filled("template", config, row)
        if self.own_columns(config):
            return required_text(row, config.prompt_column or "prompt")
        self._check_single_turn(row)
        if self._is_alpaca(row, config):
            return _alpaca_prompt(row)
        prompt, system = required_text(row, "prompt"), optional_text(row, "system")
        return f"{system}\n\n{prompt}" if system else prompt

    def _check_single_turn(self, row: Row) -> None:
        for column in self.refused:
            if holds_something(row.get(column)) and row[column] != "[]":
                raise DataError(
                    f"column {column!r} holds {shown(row[column])}; allowed: an empty one, or "
                    f"task.name: chat, which reads {column}"
                )

    def completion(self, row: Row, config: Any) -> str:
        """What the row's prompt is to be continued with. Raises DataError if it is no text."""
        if config.completion_template:
            return _filled("completion_template", config, row)
        if self._is_alpaca(row, config):
            return required_text(row, "output")
        return required_text(row, config.completion_column or "completion")

    def _is_alpaca(self, row: Row, config: Any) -> bool:
        own = self.own_columns(config)
        return not own and self.format_of(tuple(row), config).name == "alpaca"


def _filled(key: str, config: Any, row: Row) -> str:
    text = fill(getattr(config, key), row)
    if not text.strip():
        what = "" if key == "template" else ": nothing to train on"
        raise DataError(f"the text of task.{key} is empty{what}")
    return text


def _alpaca_prompt(row: Row) -> str:
    instruction, given = required_text(row, "instruction"), optional_text(row, "input")
    first = optional_text(row, "system") or (_WITH_INPUT if given else _WITHOUT_INPUT)
    middle = f"### Input:\n{given}\n\n" if given else ""
    return f"{first}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:"


TASK = Completion()
