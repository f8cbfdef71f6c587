"""``lorakit generate``: text from a model, with or without an adapter.

A chat on the terminal, or from piped lines: one line a turn.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.output import check_distinct, check_writable, progress, say, write_text
from lorakit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.evaluation.sampling import Decoding


#: Shortened where the model's window leaves less; what the user asks for is not.
_MAX_NEW_TOKENS = 256


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or Hub id.")],
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Adapter to put on the model.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Continue this text.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk through the chat template.")] = False,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help='Lines {"prompt": ..} or {"messages": ..}.'),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where --input's answers go [stdout].")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="[default: 256, or what fits the model's window]"),
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Draw among the likeliest that add up to P [1]."),
    ] = None,
    num_beams: Annotated[
        int, typer.Option(metavar="N", min=1, help="Above 1: a search, printed at its end.")
    ] = 1,
    length_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Score = log probability / length^X [1].")
    ] = None,
    no_repeat_ngram_size: Annotated[
        int, typer.Option(metavar="N", min=0, help="No N tokens twice in an answer; 0: allowed.")
    ] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before TEXT; may be repeated.")
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Of what is drawn.")
    ] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="D", help="float32, bfloat16 or float16 [default: the model's own]."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="R", help="Commit or tag on the Hub.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")
    ] = False,
) -> None:
    """Continue a prompt, hold a chat, or answer a file of prompts.

    Without --prompt, --chat and --input: a chat on a terminal, else stdin is the prompt.

    Example: lorakit generate models/smollm2-135m-instruct --prompt "Once upon a time"
    """
    _check_options(prompt, chat, input_file, output)
    _check_choice(temperature, top_p, num_beams, length_penalty, stop or [])
    if prompt is None and not chat and input_file is None:
        chat = sys.stdin is not None and sys.stdin.isatty()
        prompt = None if chat else _stdin_prompt()

    from lorakit.api import load_for_generation

    loaded = load_for_generation(
        model, adapter, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code,
        say=say,
    )  # fmt: skip
    from lorakit.evaluation.sampling import Decoding

    decoding = Decoding(
        max_new_tokens=max_new_tokens or _MAX_NEW_TOKENS,
        num_beams=num_beams,
        length_penalty=1.0 if length_penalty is None else length_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        temperature=temperature,
        top_p=1.0 if top_p is None else top_p,
        stop=tuple(stop or ()),
        seed=seed,
        fit_window=max_new_tokens is None,
    )
    if num_beams > 1 and input_file is None:
        say(f"--num-beams {num_beams}: an answer is printed when its search has ended")
    if chat:
        hold_chat(*loaded, decoding)
    elif input_file is not None:
        _answer(*loaded, input_file, output, decoding)
    else:
        assert prompt is not None
        _stream(*loaded, prompt, decoding)


def _check_options(
    prompt: str | None,
    chat: bool,
    input_file: Path | None,
    output: Path | None,
) -> None:
    given = {"--prompt": prompt is not None, "--chat": chat, "--input": input_file is not None}
    names = [name for name, there in given.items() if there]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} exclude each other; allowed: one of them")
    if output is not None and input_file is None:
        raise UserError(f"--output {output}: only with --input; a single answer goes to stdout")
    if input_file is not None and not input_file.is_file():
        raise UserError(f"--input {input_file}: no such file")
    check_writable("--output", output)
    check_distinct({"--output": output}, {input_file: "the input"} if input_file else {})


def _check_choice(
    temperature: float,
    top_p: float | None,
    num_beams: int,
    length_penalty: float | None,
    stop: list[str],
) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"--temperature {temperature}: allowed: 0 and above")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: allowed: above 0, to 1")
    if length_penalty is not None and not -10 <= length_penalty <= 10:
        raise UserError(f"--length-penalty {length_penalty}: allowed: -10 to 10")
    if num_beams > 1 and temperature > 0:
        raise UserError("--num-beams above 1 and --temperature above 0 exclude each other")
    if top_p is not None and temperature == 0:
        raise UserError(f"--top-p {top_p}: only with --temperature above 0; nothing is drawn")
    if length_penalty is not None and num_beams == 1:
        raise UserError(f"--length-penalty {length_penalty}: only with --num-beams above 1")
    if not all(stop):
        raise UserError("--stop '': allowed: a text of one character or more")


def _stdin_prompt() -> str:
    try:
        text = sys.stdin.read().rstrip("\n") if sys.stdin is not None else ""
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: not UTF-8 text: {error}") from error
    if not text.strip():
        raise UserError("no prompt: stdin is empty; allowed: --prompt TEXT, --chat, --input FILE")
    return text


def _stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, decoding: Decoding
) -> None:
    from lorakit.evaluation.generation import stream_text
    from lorakit.evaluation.prompts import text_request

    request = text_request(prompt, tokenizer)
    say_limits(model, tokenizer, [request.ids], decoding)
    stream_text(model, tokenizer, request.ids, write_out, decoding)
    write_out("\n")


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_file: Path,
    output: Path | None,
    decoding: Decoding,
) -> None:
    from lorakit.evaluation.generation import generate_text
    from lorakit.evaluation.progress import Watch
    from lorakit.evaluation.prompts import read_requests

    requests = read_requests(input_file, tokenizer, say)
    say_limits(model, tokenizer, [request.ids for request in requests], decoding)
    with progress("generated") as report:
        texts = generate_text(
            model,
            tokenizer,
            [request.ids for request in requests],
            decoding,
            watch=Watch(len(requests), report),
        )
    rows = [
        {"prompt": request.text, "generated": text}
        for request, text in zip(requests, texts, strict=True)
    ]
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    if output is not None:
        write_text(output, lines)
        say(f"{output}: {len(rows)} answers")
    else:
        write_out(lines)


def say_limits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    decoding: Decoding,
) -> None:
    """Say which answers the model's window limits to less than the default."""
    from lorakit.evaluation.hf_generate import prompt_limits
    from lorakit.models.load import window

    limits = prompt_limits(model, tokenizer, prompts, decoding)
    short = [limit for limit in limits if limit < decoding.max_new_tokens]
    if not short:
        return
    room, least = window(model), min(short)
    if len(prompts) == 1:
        say(f"at most {least} new tokens in place of {decoding.max_new_tokens}: the prompt leaves "
            f"no more of the model's window of {room} tokens")  # fmt: skip
    else:
        say(f"{len(short):,} of {len(prompts):,} prompts leave fewer than "
            f"{decoding.max_new_tokens} new tokens in the model's window of {room} tokens; the "
            f"longest leaves {least}")  # fmt: skip


def write_out(text: str) -> Any:
    """To stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


Messages = list[dict[str, str]]


def hold_chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding
) -> None:
    """Answer line after line until EOF or ``/exit``; ``/clear`` forgets what was said. Each answer
    draws numbers of its own."""
    from lorakit.evaluation.generation import stream_text
    from lorakit.evaluation.prompts import chat_request

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
    from lorakit.evaluation.prompts import chat_request
    from lorakit.models.load import window

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
