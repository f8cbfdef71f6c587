"""Read and encode the prompts and chats for ``lorakit generate``, given directly or in a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.data.chat import chat_prompt_text, encode_chat_prompt
from lorakit.data.chat.traces import ignored_in_prompt
from lorakit.data.examples import Segment, TextExample
from lorakit.data.texts import encode_prompt
from lorakit.errors import DataError, shown
from lorakit.notes import Say, silent

_ALLOWED = (
    '{"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}, optionally with '
    '"tools": [...] next to the messages'
)
#: The keys that are read from a line of each kind.
_KEYS = {"prompt": ("prompt",), "messages": ("messages", "tools")}
_NO_LIMIT = 2**31


@dataclass(frozen=True)
class Request:
    """A text for the model to continue (for a chat, as rendered by the template) and its ids."""

    text: str
    input_ids: list[int]


def text_request(text: str, tokenizer: Any) -> Request:
    """Encode a prompt as before a completion in training. Raises DataError if it is empty."""
    if not text.strip():
        raise DataError("the prompt is empty")
    _check_text(text)
    example = TextExample((Segment(text, trained=False),), eos=False)
    return Request(text, encode_prompt(example, tokenizer, _NO_LIMIT))


def chat_request(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Request:
    """Encode a chat up to the start of the assistant's next turn.

    Raises DataError if the tokenizer has no chat template, or if the template rejects the messages.
    """
    if not tokenizer.chat_template:
        raise DataError("the model's tokenizer has no chat template; allowed: a plain prompt")
    for message in messages:
        if isinstance(content := message.get("content"), str):
            _check_text(content)
    text = chat_prompt_text(messages, tokenizer, tools)
    _check_text(text)
    return Request(text, encode_chat_prompt(messages, tokenizer, tools))


def read_requests(
    file: Path, tokenizer: Any, say: Say = silent, *, system: str | None = None
) -> list[Request]:
    """Read a JSON Lines file of prompts and chats. Unused keys are reported to ``say``.

    ``system`` is the system message of chats that have none. Raises DataError, with the line, for
    anything else, and for a prompt if ``system`` is given.
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
                requests.append(_read_line(line, tokenizer, unread, system))
            except DataError as error:
                raise DataError(f"{file}:{number}: {error}") from error
    if not requests:
        raise DataError(f"--input {file}: the file is empty")
    for note in unread.notes():
        say(f"--input {file}: {note}")
    return requests


@dataclass
class _Unread:
    """Counts the lines with a key that is not read, and the messages with a key that the chat
    template ignores."""

    of_lines: Counter[str] = field(default_factory=Counter)
    of_messages: Counter[str] = field(default_factory=Counter)

    def notes(self) -> list[str]:
        found = (
            ("unused keys", self.of_lines),
            ("the chat template ignores these keys", self.of_messages),
        )
        return [
            f"{text}: " + ", ".join(f"{key!r} ({count:,})" for key, count in sorted(counts.items()))
            for text, counts in found
            if counts
        ]


def _read_line(line: str, tokenizer: Any, unread: _Unread, system: str | None) -> Request:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}; allowed: {_ALLOWED}") from error
    kinds = [kind for kind in _KEYS if isinstance(row, dict) and row.get(kind) is not None]
    if len(kinds) == 2:
        raise DataError("'prompt' and 'messages' are mutually exclusive; allowed: one of them")
    if not kinds:
        raise DataError(f"{shown(row)}; allowed: {_ALLOWED}")
    unread.of_lines.update(key for key in row if key not in _KEYS[kinds[0]])
    if kinds == ["prompt"] and isinstance(row["prompt"], str):
        if system is not None:
            raise DataError('"prompt" has no system message; allowed with --system: "messages"')
        return text_request(row["prompt"], tokenizer)
    tools = row.get("tools") or None
    if kinds == ["messages"] and _are_messages(row["messages"]) and _are_tools(tools):
        messages = row["messages"]
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        request = chat_request(messages, tokenizer, tools)
        unread.of_messages.update(ignored_in_prompt(row["messages"], tools, tokenizer))
        return request
    raise DataError(f"{shown(row)}; allowed: {_ALLOWED}")


def _check_text(text: str) -> None:
    """Raise DataError for a lone surrogate: half a character, or a byte that is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"invalid UTF-8 text at character {error.start + 1}") from error


def _are_messages(value: Any) -> bool:
    """Whether ``value`` is a list of messages; only a message with tool calls may lack content."""
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
