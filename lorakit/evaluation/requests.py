"""What ``generate`` is asked to continue: texts, and chats through the tokenizer's template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.chat import encode_chat_prompt, render
from lorakit.data.examples import Segment, TextExample
from lorakit.data.tokens import encode_prompt
from lorakit.errors import DataError, shown

_ALLOWED = '{"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}'
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


def chat_request(messages: Sequence[dict[str, str]], tokenizer: Any) -> Request:
    """A chat up to where the assistant's next turn begins. Raises DataError if the tokenizer has
    no chat template or the template refuses the messages."""
    if not tokenizer.chat_template:
        raise DataError("the model's tokenizer has no chat template; allowed: a plain prompt")
    listed = list(messages)
    for message in listed:
        _check_text("".join(message.values()))
    text = render(tokenizer, listed, add_generation_prompt=True)
    return Request(text, encode_chat_prompt(listed, tokenizer))


def read_requests(file: Path, tokenizer: Any) -> list[Request]:
    """A JSON-lines file. Raises DataError with the line for what is neither prompt nor messages."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"--input {file}: {reason}") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                requests.append(_read_line(line, tokenizer))
            except DataError as error:
                raise DataError(f"{file}:{number}: {error}") from error
    if not requests:
        raise DataError(f"--input {file}: the file is empty")
    return requests


def _read_line(line: str, tokenizer: Any) -> Request:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}; allowed: {_ALLOWED}") from error
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        return text_request(row["prompt"], tokenizer)
    if isinstance(row, dict) and _are_messages(row.get("messages")):
        return chat_request(row["messages"], tokenizer)
    raise DataError(f"{shown(row)}; allowed: {_ALLOWED}")


def _check_text(text: str) -> None:
    """Raise DataError for a lone surrogate: half a character, or a byte that is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"not valid UTF-8 text at character {error.start + 1}") from error


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )
