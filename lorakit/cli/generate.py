"""``generate``: text from a model, with or without an adapter."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.chat import chat as start_chat
from lorakit.cli.chat import say_limits, stream_answer, system_prompt, write
from lorakit.cli.console import (
    Dtype,
    MethodFile,
    Subfolder,
    TrustRemoteCode,
    check_distinct,
    check_exclusive,
    check_writable,
    model_and_adapter,
    only_results,
    option_named,
    progress,
    say,
    write_output,
)
from lorakit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.api import Decoding

#: Reduced if the model's window leaves less room; a number given by the user is not.
_MAX_NEW_TOKENS = 256

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model: directory or Hub id.")]
_Adapter = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Adapter of the model: directory or Hub id.")
]
_Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="Continue TEXT.")]
_Chat = Annotated[bool, typer.Option("--chat", help="Chat, with the model's chat template.")]
_System = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="System prompt of a chat [default: that of the training data, if it has only one].",
    ),
]
_Input = Annotated[
    Path | None,
    typer.Option(
        "--input", metavar="FILE", help='JSON lines {"prompt": TEXT} or {"messages": [...]}.'
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File for the answers to --input [default: stdout]."),
]
_MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Generate at most N tokens [default: 256, or what fits the model's window].",
    ),
]
_Temperature = Annotated[
    float, typer.Option(metavar="T", help="Sampling temperature; 0 decodes greedily.")
]
_TopP = Annotated[
    float | None,
    typer.Option(
        metavar="P", help="Sample from the top tokens with total probability P [default: 1]."
    ),
]
_NumBeams = Annotated[
    int, typer.Option(metavar="N", min=1, help="Beam search if above 1; output is not streamed.")
]
_LengthPenalty = Annotated[
    float | None,
    typer.Option(metavar="X", help="Beams are scored by log probability / length^X [default: 1]."),
]
_NoRepeatNgramSize = Annotated[
    int, typer.Option(metavar="N", min=0, help="Never repeat N tokens in an answer; 0: no limit.")
]
_Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Stop before TEXT is generated. Can be repeated."),
]
_Seed = Annotated[
    int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Random seed for sampling.")
]
_Revision = Annotated[
    str | None, typer.Option(metavar="R", help="Load this commit or tag of the model from the Hub.")
]


def generate(
    model: _Model,
    adapter: _Adapter = None,
    prompt: _Prompt = None,
    chat: _Chat = False,
    system: _System = None,
    input_file: _Input = None,
    output: _Output = None,
    max_new_tokens: _MaxNewTokens = None,
    temperature: _Temperature = 0.0,
    top_p: _TopP = None,
    num_beams: _NumBeams = 1,
    length_penalty: _LengthPenalty = None,
    no_repeat_ngram_size: _NoRepeatNgramSize = 0,
    stop: _Stop = None,
    seed: _Seed = 0,
    dtype: Dtype = None,
    revision: _Revision = None,
    method: MethodFile = None,
    subfolder: Subfolder = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a prompt, chat, or answer the prompts of a file.

    With --chat and --prompt, the prompt is one message of a chat. Without --prompt, --chat or
    --input: chat on a terminal, otherwise stdin is the prompt.

    Example: lorakit generate Qwen/Qwen3-8B --adapter runs/chat/adapter --chat
    """
    model, adapter = model_and_adapter(model, adapter, subfolder)
    _check_input(prompt, chat, input_file, output)
    _check_sampling(temperature, top_p, num_beams, length_penalty, stop or [])
    chat, prompt = _chat_or_prompt(chat, prompt, input_file, system)

    from lorakit.api import Decoding, load_for_generation, trained_system_prompts

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
    with only_results(), option_named("--adapter", adapter):
        loaded = load_for_generation(
            model, adapter, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code,
            method=method, say=say,
        )  # fmt: skip
    trained = trained_system_prompts(model, adapter)
    if chat:
        start_chat(*loaded, decoding, system_prompt(system, trained), prompt)
    elif input_file is not None:
        _answer(*loaded, input_file, output, decoding, system)
    elif prompt is not None:
        _stream(*loaded, prompt, decoding, is_chat=bool(trained), is_base=adapter is None)


def _check_input(
    prompt: str | None, chat: bool, input_file: Path | None, output: Path | None
) -> None:
    check_exclusive({"--prompt": prompt is not None, "--input": input_file is not None})
    if chat and input_file is not None:
        raise UserError(
            "--chat and --input are mutually exclusive; hint: rows of the file with messages are "
            "chats"
        )
    if output is not None and input_file is None:
        raise UserError(f"--output {output}: requires --input; a single answer goes to stdout")
    if input_file is not None and not input_file.is_file():
        raise UserError(f"--input {input_file}: no such file")
    check_writable("--output", output)
    check_distinct({"--output": output}, {input_file: "the input file"} if input_file else {})


def _check_sampling(
    temperature: float,
    top_p: float | None,
    num_beams: int,
    length_penalty: float | None,
    stop: list[str],
) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"--temperature {temperature}: out of range; allowed: >= 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: out of range; allowed: > 0 and <= 1")
    if length_penalty is not None and not -10 <= length_penalty <= 10:
        raise UserError(f"--length-penalty {length_penalty}: out of range; allowed: -10 to 10")
    if num_beams > 1 and temperature > 0:
        raise UserError("--num-beams above 1 and --temperature above 0 are mutually exclusive")
    if top_p is not None and temperature == 0:
        raise UserError(f"--top-p {top_p}: requires --temperature above 0")
    if length_penalty is not None and num_beams == 1:
        raise UserError(f"--length-penalty {length_penalty}: requires --num-beams above 1")
    if not all(stop):
        raise UserError("--stop '': empty; allowed: one or more characters")


def _chat_or_prompt(
    chat: bool, prompt: str | None, input_file: Path | None, system: str | None
) -> tuple[bool, str | None]:
    """What is given; if nothing is, whether stdin is a terminal to chat on, or else the prompt that
    it contains. Raises UserError for an empty prompt, or one with a ``system`` prompt."""
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt: the prompt is empty")
    if not chat and prompt is None and input_file is None:
        chat = sys.stdin is not None and sys.stdin.isatty()
        prompt = None if chat else _stdin_prompt()
    if system is not None and prompt is not None and not chat:
        raise UserError("--system: requires --chat, or --input with messages")
    return chat, prompt


def _stdin_prompt() -> str:
    try:
        text = sys.stdin.read().rstrip("\n") if sys.stdin is not None else ""
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: not UTF-8 text: {error}") from error
    if not text.strip():
        raise UserError("no prompt: stdin is empty; allowed: --prompt TEXT, --chat, --input FILE")
    return text


def _stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    decoding: Decoding,
    is_chat: bool,
    is_base: bool,
) -> None:
    """Continue the prompt; ``is_chat`` says that the adapter was trained on chats, ``is_base`` that
    there is none."""
    from lorakit.api import text_request

    if is_chat:
        say("the adapter was trained on chats: with --chat, the prompt becomes a message")
    request = text_request(prompt, tokenizer)
    say_limits(model, tokenizer, [request.input_ids], decoding)
    answer = stream_answer(model, tokenizer, request.input_ids, decoding)
    if is_base and not answer.strip() and tokenizer.chat_template:
        say("hint: the model has a chat template; with --chat, the prompt becomes a message")


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_file: Path,
    output: Path | None,
    decoding: Decoding,
    system: str | None,
) -> None:
    from lorakit.api import ProgressMonitor, generate_text, read_requests

    requests = read_requests(input_file, tokenizer, say, system=system)
    prompts = [request.input_ids for request in requests]
    say_limits(model, tokenizer, prompts, decoding)
    with only_results(), progress("generated") as report:
        monitor = ProgressMonitor(len(requests), report)
        texts = generate_text(model, tokenizer, prompts, decoding, monitor=monitor)
    rows = [
        {"prompt": request.text, "generated": text}
        for request, text in zip(requests, texts, strict=True)
    ]
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    if output is not None:
        write_output(output, lines)
        say(f"{output}: {len(rows)} answers")
    else:
        write(lines)
