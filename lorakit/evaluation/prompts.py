"""A task's rows -> the prompts that the model continues, in tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.data.chat import encode_chat_prompt
from lorakit.data.examples import ChatExample, ClassificationExample
from lorakit.data.sources import Split
from lorakit.data.tokens import encode_prompt
from lorakit.errors import DataError
from lorakit.tasks.base import Task


def encode_prompts(
    task: Task,
    config: Any,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    window: int | None,
    rows: Iterable[int] | None = None,
) -> list[list[int]]:
    """One prompt for each of ``rows`` (None: all), as it stands before the completion in training.

    A prompt of more than ``task.max_length`` tokens, or too long for ``task.max_new_tokens`` to
    follow it in the model's ``window``, loses its beginning, as in training. Raises DataError with
    file and row for a row that the task refuses, or of which no token is left.
    """
    room = _room(config, window)
    prompts = []
    for index in range(len(split)) if rows is None else rows:
        try:
            prompts.append(_prompt_ids(task, config, split, index, tokenizer, room))
        except DataError as error:
            raise DataError(f"{split.locate(index)}: {error}") from error
    return prompts


def fit_max_new_tokens(config: Any, window: int | None, say: Callable[[str], None]) -> Any:
    """``config`` with a default of ``task.max_new_tokens`` that takes at most half of the model's
    ``window``, which is said; a value that the recipe gives stays as it is."""
    most = config.max_new_tokens
    if "max_new_tokens" in config.model_fields_set or window is None or 2 * most <= window:
        return config
    fits = max(1, window // 2)
    say(f"task.max_new_tokens: {fits} in place of the default {most}, half of the model's window "
        f"of {window} tokens")  # fmt: skip
    return config.model_copy(update={"max_new_tokens": fits})


def check_all_prompts(
    task: Task,
    config: Any,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    window: int | None,
    say: Callable[[str], None],
) -> None:
    """Raise the DataErrors of ``encode_prompts`` before anything is measured; say how many prompts
    the window shortens more than training does."""
    prompts = encode_prompts(task, config, split, tokenizer, window)
    room = _room(config, window)
    full = sum(len(prompt) == room for prompt in prompts)
    if room < config.max_length and full:
        say(
            f"{split.name}: {full:,} of {len(prompts):,} prompts fill the {room} tokens that "
            f"task.max_new_tokens = {config.max_new_tokens} leaves of the model's {window}; longer "
            "ones lose their beginning"
        )


def _room(config: Any, window: int | None) -> int:
    """The most tokens of a prompt."""
    room: int = config.max_length
    if window is not None:
        room = min(room, window - config.max_new_tokens)
    if room < 1:
        raise DataError(
            f"task.max_new_tokens = {config.max_new_tokens}: no room for a prompt in the model's "
            f"window of {window} tokens; allowed: at most {max((window or 0) - 1, 0)}"
        )
    return room


def _prompt_ids(
    task: Task,
    config: Any,
    split: Split,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
) -> list[int]:
    example = task.prompt(split.rows[index], config)
    assert not isinstance(example, ClassificationExample), "an encoder generates nothing"
    if isinstance(example, ChatExample):
        ids = encode_chat_prompt(example.messages, tokenizer, example.tools)[-room:]
    else:
        ids = encode_prompt(example, tokenizer, room)
    if not ids:
        raise DataError("the prompt is empty: no token that the model could continue")
    return ids
