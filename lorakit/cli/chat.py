"""The chat of ``lorakit generate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.cli.console import say
from lorakit.errors import UserError, printable, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.api import Decoding

_HELP = """/reset, /clear   start a new chat
/help            print this
/exit, Ctrl-D    quit"""


def system_prompt(given: str | None, trained: Sequence[str]) -> str | None:
    """Return the system prompt of a chat, None for none: ``given``, or the only one of the training
    data, which ``trained`` lists. Say which one is used, or how it differs."""
    if given is not None:
        if given and trained == [""]:
            say("--system: the training data has no system prompt")
        elif trained and given not in trained:
            several = "one" if len(trained) == 1 else "ones"
            first = shown(next(filter(None, trained)))
            say(f"--system differs from the {several} of the training data: {first}")
        return given or None
    if len(trained) > 1:
        first = shown(next(filter(None, trained)))
        say(f"the training data has several system prompts, such as {first}; --system sets one")
    if len(trained) != 1 or not trained[0]:
        return None
    say(f"using the system prompt of the training data: {shown(trained[0])}; --system sets another")
    return trained[0]


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    system: str | None,
    message: str | None = None,
) -> None:
    """Answer ``message``; without one, answer line by line until end of input or ``/exit``, where
    ``/reset`` starts a new chat.

    Every chat begins with the system prompt ``system``. Every answer is sampled with its own random
    numbers.
    """
    from lorakit.api import chat_request

    first = [] if system is None else [{"role": "system", "content": system}]
    if message is not None:
        ids = chat_request([*first, {"role": "user", "content": message}], tokenizer).input_ids
        say_limits(model, tokenizer, [ids], decoding)
        stream_answer(model, tokenizer, ids, decoding)
        return
    # Fails without a chat template, or if that has no system prompts.
    chat_request([*first, {"role": "user", "content": "?"}], tokenizer)
    if sys.stdin is not None and sys.stdin.isatty():
        say("/exit or Ctrl-D to quit, /reset to start over, /help for help")
    messages: list[dict[str, str]] = []
    answers = 0
    while (line := _read_line()) is not None and line.strip() != "/exit":
        if line.strip() in ("/reset", "/clear"):
            messages = []
        elif line.strip() == "/help":
            say(_HELP)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            ids = _fit_window(first, messages, model, tokenizer, decoding)
            if not answers:
                say_limits(model, tokenizer, [ids], decoding)
            answer = stream_answer(model, tokenizer, ids, decoding, row=answers)
            answers += 1
            messages.append({"role": "assistant", "content": answer})


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: list[int],
    decoding: Decoding,
    row: int = 0,
) -> str:
    """Write an answer as it is generated, and return it. Say if it is empty, which a terminal does
    not show."""
    from lorakit.api import stream_text

    if decoding.num_beams > 1 and not row:
        say(f"--num-beams {decoding.num_beams}: answers are printed when the search is complete")
    answer = stream_text(model, tokenizer, input_ids, write, decoding, row=row)
    write("\n")
    if not answer.strip():
        say("empty answer: the model generated an end-of-sequence token first")
    return answer


def _read_line() -> str | None:
    """Read a line without its line break; None at the end of input."""
    if sys.stdin is None:  # closed by the parent process
        return None
    try:
        line = input("> ") + "\n" if sys.stdin.isatty() else sys.stdin.readline()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: not UTF-8 text: {error}") from error
    return line.rstrip("\n") if line else None


def _fit_window(
    first: list[dict[str, str]],
    messages: list[dict[str, str]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
) -> list[int]:
    """Tokenize the chat, dropping its oldest turns if it exceeds the model's window. ``first``, the
    system prompt, is kept.

    Unless its length was requested, an answer keeps at least a quarter of the window.
    """
    from lorakit.api import chat_request, window

    room = window(model)
    answer = decoding.max_new_tokens
    if decoding.fit_window and room is not None:
        answer = min(answer, max(1, room // 4))
    ids = chat_request([*first, *messages], tokenizer).input_ids
    before = len(messages)
    while room is not None and len(ids) + answer > room and len(messages) > 1:
        del messages[:2]
        ids = chat_request([*first, *messages], tokenizer).input_ids
    if len(messages) < before:
        say(f"the chat exceeds the model's window of {room} tokens: dropped its first "
            f"{before - len(messages)} messages")  # fmt: skip
    return ids


def say_limits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    decoding: Decoding,
) -> None:
    """Say which answers are limited to fewer tokens than requested by the model's window."""
    from lorakit.api import prompt_limits, window

    limits = prompt_limits(model, tokenizer, prompts, decoding)
    short = [limit for limit in limits if limit < decoding.max_new_tokens]
    if not short:
        return
    room, least = window(model), min(short)
    if len(prompts) == 1:
        say(f"max_new_tokens reduced from {decoding.max_new_tokens} to {least}: the model's window "
            f"has {room} tokens")  # fmt: skip
    else:
        say(f"max_new_tokens reduced from {decoding.max_new_tokens} for {len(short):,} of "
            f"{len(prompts):,} prompts, to {least} for the longest: the model's window has {room} "
            "tokens")  # fmt: skip


def write(text: str) -> None:
    """Write to stdout without buffering; generated text does not control a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
