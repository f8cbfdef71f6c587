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


def check_all_prompts(
    task: Task,
    config: Any,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    window: int | None,
    say: Callable[[str], None],
) -> Any:
    """``config`` with ``task.max_new_tokens`` as the prompts of ``split`` leave room for.

    A default that does not fit into the model's ``window`` behind the longest prompt is shortened,
    down to 16 tokens (half of a smaller window); a value that the recipe gives stays. ``say`` gets
    what was shortened, and how many prompts then lose their beginning to the window. Raises the
    DataErrors of ``encode_prompts`` before anything is measured.
    """
    _room(config, window if _is_given(config) else None)
    prompts = encode_prompts(task, config, split, tokenizer, window=None)
    if window is not None and not _is_given(config):
        config = _fitted(config, max(map(len, prompts), default=0), window, split.name, say)
    room = _room(config, window)
    if cut := sum(len(prompt) > room for prompt in prompts):
        say(
            f"{split.name}: {cut:,} of {len(prompts):,} prompts lose their beginning: they have "
            f"more than the {room:,} tokens that task.max_new_tokens = {config.max_new_tokens:,} "
            f"leaves of the model's window of {window:,}"
        )
    return config


def _is_given(config: Any) -> bool:
    return "max_new_tokens" in config.model_fields_set


def _fitted(config: Any, longest: int, window: int, split: str, say: Callable[[str], None]) -> Any:
    default = config.max_new_tokens
    least = min(_FEWEST_NEW_TOKENS, max(1, window // 2))
    fits = min(default, max(window - longest, least))
    if fits == default:
        return config
    say(
        f"task.max_new_tokens: {fits} in place of the default {default}; {split} has prompts "
        f"of up to {longest:,} tokens, and the model's window is {window:,} tokens"
    )
    return config.model_copy(update={"max_new_tokens": fits})


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
