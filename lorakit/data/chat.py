"""Messages -> tokens through the tokenizer's chat template; the assistant's turns are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.data.call_arguments import with_fitting_arguments
from lorakit.data.examples import ChatExample
from lorakit.errors import DataError

#: A content that no chat holds.
_MARK = "\u2063lorakit-turn\u2063"


def encode_chat(example: ChatExample, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The whole chat's ids, and which of them the assistant wrote (its end-of-turn token too).

    A turn's place is found by rendering the chat once more with a mark in its stead; the special
    token right behind it, or EOS behind white space, ends the turn and is trained with it. Raises
    DataError where a template does not render so.
    """
    messages = list(example.messages)
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template, which the chat task needs")
    text = render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = list(encoded.input_ids)
    places: list[tuple[int, int]] = encoded.offset_mapping
    trained = [False] * len(ids)
    for index in range(len(messages)):
        if example.is_trained(index):
            begin, end = _span(tokenizer, messages, index, text)
            end = _with_end_token(end, text, ids, places, tokenizer)
            for i, (start, stop) in enumerate(places):
                trained[i] |= begin <= start < stop <= end
    return ids, trained


def encode_chat_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[int]:
    """The ids before the assistant's next turn, as they stand in training."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
) -> str:
    """The chat as text. Raises DataError with the template's own complaint."""

    def rendered(given: Sequence[Mapping[str, Any]]) -> str:
        return str(
            tokenizer.apply_chat_template(
                given, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    try:
        return with_fitting_arguments(rendered, messages, text_of=str)
    except Exception as error:  # jinja raises its own types, templates raise through it
        raise DataError(f"the chat template refuses the messages: {error}") from error


def _span(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], index: int, text: str
) -> tuple[int, int]:
    """Where the content of turn ``index`` stands in ``text``: between what stays the same when the
    content is another."""
    marked = [dict(message) for message in messages]
    marked[index]["content"] = _MARK
    before, found, after = render(tokenizer, marked).partition(_MARK)
    same = text.startswith(before) and text.endswith(after)
    if not (found and same and len(before) + len(after) < len(text)):
        raise DataError(
            f"message {index + 1}: the chat template renders the rest of the chat differently "
            "with another content here, so this turn's tokens cannot be told apart"
        )
    return len(before), len(text) - len(after)


def _with_end_token(
    end: int, text: str, ids: list[int], places: list[tuple[int, int]], tokenizer: Any
) -> int:
    """Where the token stops that ends the turn; ``end`` if there is none."""
    special = tokenizer.added_tokens_decoder
    behind_space = len(text) - len(text[end:].lstrip())
    for token, (start, stop) in zip(ids, places, strict=True):
        if start == end < stop and token in special:
            return stop
        if start == behind_space and token == tokenizer.eos_token_id:
            return stop
    return end
