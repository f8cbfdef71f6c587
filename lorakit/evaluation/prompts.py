"""Encode the prompts of a task that generates text, and convert generated texts to answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.data.chat import around_answer, encode_chat_prompt
from lorakit.data.chat.ids import Joiner
from lorakit.data.chat.template import PAYLOAD, ChatTemplate
from lorakit.data.chat.turns import TurnReader, content_text
from lorakit.data.examples import ChatExample, ClassificationExample
from lorakit.data.sources import Split
from lorakit.data.texts import TextEncoder
from lorakit.errors import DataError
from lorakit.tasks.base import Prediction, Task

#: ``fit_prompts`` lowers a default of ``task.max_new_tokens`` to no less than this.
_MIN_NEW_TOKENS = 16


def encode_prompts(
    task: Task,
    config: Any,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    window: int | None,
    rows: Iterable[int] | None = None,
) -> list[list[int]]:
    """Encode the prompt of each of ``rows`` (None: all), as before the completion in training.

    A prompt of more than ``task.max_length`` tokens, or one that leaves fewer than
    ``task.max_new_tokens`` of the model's ``window``, loses its beginning, as in training. Raises
    DataError, with file and row, for a row that the task rejects and for an empty prompt.
    """
    room = _prompt_room(config, window)
    texts = TextEncoder(Joiner(tokenizer))
    prompts = []
    for index in range(len(split)) if rows is None else rows:
        try:
            prompts.append(_prompt_ids(task, config, split, index, texts, room))
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

    A default that does not fit into the model's ``window`` after the longest prompt is lowered, but
    not below 16 tokens, or half the window if that is less; a value from the recipe is unchanged.
    Reports to ``say`` what was lowered, and how many prompts are truncated to the window. Returns
    the configuration and one prompt per row. Raises the same errors as ``encode_prompts``.
    """
    given = "max_new_tokens" in config.model_fields_set
    _prompt_room(config, window if given else None)
    prompts = encode_prompts(task, config, split, tokenizer, window=None)
    if window is not None and not given:
        config = _fitted(config, max(map(len, prompts), default=0), window, split.name, say)
    room = _prompt_room(config, window)
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
    least = min(_MIN_NEW_TOKENS, max(1, window // 2))
    fits = min(default, max(window - longest, least))
    if fits == default:
        return config
    say(
        f"task.max_new_tokens: {fits} instead of the default {default}; {split} has prompts of up "
        f"to {longest:,} tokens, and the model's window is {window:,} tokens"
    )
    return config.model_copy(update={"max_new_tokens": fits})


def _prompt_room(config: Any, window: int | None) -> int:
    """Return the maximum number of tokens in a prompt."""
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
    texts: TextEncoder,
    room: int,
) -> list[int]:
    example = task.prompt(split.rows[index], config)
    assert not isinstance(example, ClassificationExample), "an encoder generates nothing"
    if isinstance(example, ChatExample):
        ids = encode_chat_prompt(example.messages, texts.tokenizer, example.tools)[-room:]
    else:
        ids = texts.prompt(example, room)
    if not ids:
        raise DataError("the prompt is empty: there is no token for the model to continue")
    return ids


def answer_contents(
    task: Task,
    config: Any,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[int],
    texts: list[Prediction],
) -> list[Prediction]:
    """Return the generated ``texts`` of ``rows``, comparable with the contents of the rows.

    A chat template may change a turn's content (upper case, escaped characters). A generated text
    that equals the turn as it is trained is replaced by the content of that turn. From any other
    text, only the fixed text that the template writes before or after each answer is removed, such
    as an empty ``<think>`` block.
    """
    found = []
    trained = _TrainedTurns(tokenizer)
    for row, text in zip(rows, texts, strict=True):
        prompt = task.prompt(split.rows[row], config)
        if isinstance(prompt, ChatExample):
            content = trained.content(prompt, task.example(split.rows[row], config), text)
            if content is None:
                before, after = around_answer(prompt.messages, tokenizer, prompt.tools)
                content = _without(text, before, after)
            text = content
        found.append(text)
    return found


class _TrainedTurns:
    """Recognizes texts that equal a turn as it is trained."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._reader: TurnReader | None = None

    def content(self, prompt: ChatExample, example: Any, text: str) -> str | None:
        """Return the content of the turn that answers ``prompt`` in ``example`` if ``text`` is that
        turn as the template renders it, apart from surrounding whitespace and special tokens.
        Returns None otherwise, or if the template renders the content unchanged."""
        index = len(prompt.messages)
        if not isinstance(example, ChatExample) or len(example.messages) != index + 1:
            return None
        content = content_text(example.messages[index])
        if not content.strip() or any(example.messages[index].get(key) for key in PAYLOAD):
            return None
        if self._reader is None:
            self._reader = TurnReader(ChatTemplate(self._tokenizer))
        turn = self._reader.read(example.messages, example.tools, index)
        answer = self._reader.template.special.sub("", turn.answer).strip()
        return content if text.strip() == answer != content.strip() else None


def _without(text: str, before: str, after: str) -> str:
    head, tail = before.strip(), after.strip()
    if head and text.lstrip().startswith(head):
        text = text.lstrip()[len(head) :].lstrip()
    if tail and text.rstrip().endswith(tail):
        text = text.rstrip()[: -len(tail)].rstrip()
    return text
