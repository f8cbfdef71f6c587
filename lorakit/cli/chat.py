"""A chat on the terminal, or from piped lines: one line a turn."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lorakit.cli.progress import say
from lorakit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.evaluation.decoding import Decoding

Messages = list[dict[str, str]]


def hold_chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding
) -> None:
    """Answer line after line until EOF or ``/exit``; ``/clear`` forgets what was said. Each answer
    draws numbers of its own."""
    from lorakit.cli.generate import say_limits, write_out
    from lorakit.evaluation.requests import chat_request
    from lorakit.evaluation.streaming import stream_text

    chat_request([{"role": "user", "content": "?"}], tokenizer)
    if sys.stdin is not None and sys.stdin.isatty():
        say("/exit or Ctrl-D ends the chat, /clear begins another")
    messages: Messages = []
    answers = 0
    while (line := _read_line()) is not None and line.strip() != "/exit":
        if line.strip() == "/clear":
            messages = []
        elif line.strip():
            messages.append({"role": "user", "content": line})
            ids = _fitting(messages, model, tokenizer, decoding)
            if not answers:
                say_limits(model, tokenizer, [ids], decoding)
            answer = stream_text(model, tokenizer, ids, write_out, decoding, row=answers)
            answers += 1
            write_out("\n")
            messages.append({"role": "assistant", "content": answer})


def _read_line() -> str | None:
    """The next line without its end; None at the end of the input."""
    if sys.stdin is None:  # closed by the caller
        return None
    try:
        line = input("> ") + "\n" if sys.stdin.isatty() else sys.stdin.readline()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: not UTF-8 text: {error}") from error
    return line.rstrip("\n") if line else None


def _fitting(
    messages: Messages,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
) -> list[int]:
    """The chat in tokens; its oldest turns are forgotten where it outgrows the model's window. An
    answer whose length nobody asked for keeps at least a quarter of the window."""
    from lorakit.evaluation.requests import chat_request
    from lorakit.models.window import window

    room = window(model)
    answer = decoding.max_new_tokens
    if decoding.fit_window and room is not None:
        answer = min(answer, max(1, room // 4))
    ids = chat_request(messages, tokenizer).ids
    before = len(messages)
    while room is not None and len(ids) + answer > room and len(messages) > 1:
        del messages[:2]
        ids = chat_request(messages, tokenizer).ids
    if len(messages) < before:
        say(f"the chat outgrew the model's {room} tokens: its first {before - len(messages)} "
            "messages are forgotten")  # fmt: skip
    return ids
