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

#: A default of ``task.max_new_tokens`` gives way to the prompts down to so many.
_FEWEST_NEW_TOKENS = 16


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


def fit_max_new_tokens(
    task: Task,
    config: Any,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    window: int | None,
    say: Callable[[str], None],
) -> Any:
    """``config`` with a default of ``task.max_new_tokens`` that leaves the longest prompt of
    ``split`` whole in the model's ``window``, which is said; a value that the recipe gives stays.

    Where fewer than 16 tokens (half of a smaller window) would be left, it is that many, and
    prompts lose their beginning. Raises DataError as ``encode_prompts`` does.
    """
    most = config.max_new_tokens
    if "max_new_tokens" in config.model_fields_set or window is None:
        return config
    if config.max_length + most <= window:
        return config
    longest = max(map(len, encode_prompts(task, config, split, tokenizer, window=None)))
    least = min(_FEWEST_NEW_TOKENS, max(1, window // 2))
    fits = min(most, max(window - longest, least))
    if fits < most:
        say(
            f"task.max_new_tokens: {fits} in place of the default {most}; {split.name} has prompts "
            f"of up to {longest:,} tokens, and the model's window is {window:,} tokens"
        )
        return config.model_copy(update={"max_new_tokens": fits})
    return config


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
    room = _room(config, window)
    prompts = encode_prompts(task, config, split, tokenizer, window=None)
    if cut := sum(len(prompt) > room for prompt in prompts):
        say(
            f"{split.name}: {cut:,} of {len(prompts):,} prompts lose their beginning: they have "
            f"more than the {room:,} tokens that task.max_new_tokens = {config.max_new_tokens:,} "
            f"leaves of the model's window of {window:,}"
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
