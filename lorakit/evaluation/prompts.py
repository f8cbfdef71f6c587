"""A task's rows -> the prompts that the model continues, in tokens.

What ``generate`` is asked to continue: texts, and chats through the tokenizer's template.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.data.chat import chat_prompt_text, encode_chat_prompt
from lorakit.data.chat.traces import ignored_in_prompt
from lorakit.data.examples import ChatExample, ClassificationExample, Segment, TextExample
from lorakit.data.sources import Split
from lorakit.data.tokens import encode_prompt
from lorakit.errors import DataError, shown
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


def fit_prompts(
    task: Task,
    config: Any,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    window: int | None,
    say: Callable[[str], None],
) -> tuple[Any, list[list[int]]]:
    """Encode the prompts of ``split``, and fit ``task.max_new_tokens`` to them.

    A default that does not fit into the model's ``window`` after the longest prompt is lowered, to
    no less than 16 tokens (half of a smaller window); a value from the recipe is kept. Says what
    was lowered, and how many prompts are truncated to the window. Returns the configuration and one
    prompt per row. Raises DataError as ``encode_prompts`` does.
    """
    given = "max_new_tokens" in config.model_fields_set
    _room(config, window if given else None)
    prompts = encode_prompts(task, config, split, tokenizer, window=None)
    if window is not None and not given:
        config = _fitted(config, max(map(len, prompts), default=0), window, split.name, say)
    room = _room(config, window)
    if cut := [row for row, prompt in enumerate(prompts) if len(prompt) > room]:
        say(
            f"{split.name}: {len(cut):,} of {len(prompts):,} prompts lose their beginning: they "
            f"have more than the {room:,} tokens that task.max_new_tokens = "
            f"{config.max_new_tokens:,} leaves of the model's window of {window:,}"
        )
        shorter = encode_prompts(task, config, split, tokenizer, window, cut)
        for row, prompt in zip(cut, shorter, strict=True):
            prompts[row] = prompt
    return config, prompts


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


Say = Callable[[str], None]

_ALLOWED = (
    '{"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}, with "tools": [...] '
    "where the chat has any"
)
#: The keys of a line that are read.
_KEYS = {"prompt": ("prompt",), "messages": ("messages", "tools")}
_UNCUT = 2**31


@dataclass(frozen=True)
class Request:
    """``text`` is what the model continues, a chat as its template renders it."""

    text: str
    ids: list[int]


def text_request(text: str, tokenizer: Any) -> Request:
    """A prompt as it stands before a completion in training. Raises DataError if it is empty."""
    if not text.strip():
        raise DataError("the prompt is empty")
    _check_text(text)
    example = TextExample((Segment(text, trained=False),), eos=False)
    return Request(text, encode_prompt(example, tokenizer, _UNCUT))


def chat_request(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Request:
    """A chat up to where the assistant's next turn begins. Raises DataError if the tokenizer has
    no chat template or the template refuses the messages."""
    if not tokenizer.chat_template:
        raise DataError("the model's tokenizer has no chat template; allowed: a plain prompt")
    for message in messages:
        if isinstance(content := message.get("content"), str):
            _check_text(content)
    text = chat_prompt_text(messages, tokenizer, tools)
    _check_text(text)
    return Request(text, encode_chat_prompt(messages, tokenizer, tools))


def read_requests(file: Path, tokenizer: Any, say: Say = lambda text: None) -> list[Request]:
    """A JSON-lines file. ``say`` gets the keys that are not read.

    Raises DataError with the line for what is neither prompt nor messages.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"--input {file}: {reason}") from error
    requests, unread = [], _Unread()
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                requests.append(_read_line(line, tokenizer, unread))
            except DataError as error:
                raise DataError(f"{file}:{number}: {error}") from error
    if not requests:
        raise DataError(f"--input {file}: the file is empty")
    for note in unread.notes():
        say(f"--input {file}: {note}")
    return requests


@dataclass
class _Unread:
    """How many lines have a key that is not read, and how many messages one that the chat template
    ignores."""

    of_lines: Counter[str] = field(default_factory=Counter)
    of_messages: Counter[str] = field(default_factory=Counter)

    def notes(self) -> list[str]:
        found = (
            ("these keys are not read", self.of_lines),
            ("the chat template ignores these keys", self.of_messages),
        )
        return [
            f"{text}: " + ", ".join(f"{key!r} ({count:,})" for key, count in sorted(counts.items()))
            for text, counts in found
            if counts
        ]


def _read_line(line: str, tokenizer: Any, unread: _Unread) -> Request:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}; allowed: {_ALLOWED}") from error
    kinds = [kind for kind in _KEYS if isinstance(row, dict) and row.get(kind) is not None]
    if len(kinds) == 2:
        raise DataError("'prompt' and 'messages' exclude each other; allowed: one of them")
    if not kinds:
        raise DataError(f"{shown(row)}; allowed: {_ALLOWED}")
    unread.of_lines.update(key for key in row if key not in _KEYS[kinds[0]])
    if kinds == ["prompt"] and isinstance(row["prompt"], str):
        return text_request(row["prompt"], tokenizer)
    tools = row.get("tools") or None
    if kinds == ["messages"] and _are_messages(row["messages"]) and _are_tools(tools):
        request = chat_request(row["messages"], tokenizer, tools)
        unread.of_messages.update(ignored_in_prompt(row["messages"], tools, tokenizer))
        return request
    raise DataError(f"{shown(row)}; allowed: {_ALLOWED}")


def _check_text(text: str) -> None:
    """Raise DataError for a lone surrogate: half a character, or a byte that is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"not valid UTF-8 text at character {error.start + 1}") from error


def _are_messages(value: Any) -> bool:
    """A list of messages; only tool calls may stand in place of a content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and (
                isinstance(message.get("content"), str)
                or (message.get("content") is None and bool(message.get("tool_calls")))
            )
            for message in value
        )
    )


def _are_tools(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(tool, dict) for tool in value)
    )
