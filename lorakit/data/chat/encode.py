"""Encode a chat as rows of token ids in which the assistant's turns are trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorakit.data.chat.ids import IdRow, Joiner, joint_row, turn_rows
from lorakit.data.chat.long_chat import is_long, long_chat_turns
from lorakit.data.chat.reasoning import with_masked_reasoning
from lorakit.data.chat.template import PROBE, ChatTemplate, Message, Tools
from lorakit.data.chat.traces import Traces, shortened_turns
from lorakit.data.chat.turns import Turn, TurnReader
from lorakit.data.examples import ChatExample
from lorakit.errors import DataError

#: The names of the counts. Those of ignored keys are ``ignored:KEY``.
DIFFERS, SPLIT, SPLIT_ROWS = "chats_differ", "chats_split", "rows_of_split_chats"
STRADDLES, UNMARKED = "straddling_answers", "unmarked_turns"
MARKED_LATE, MARKED_EARLY = "late_marks", "early_marks"
SHORTENED, WITHOUT_REASONING = "shortened_turns", "turns_without_reasoning"
CHATS, TURNS, IGNORED = "chats", "turns", "ignored:"


@dataclass(frozen=True)
class EncodedChat:
    """``rows`` is a single row unless a later turn changes how the template renders, or how the
    tokenizer splits, an earlier one; then there are at most as many rows as trained turns. The keys
    of ``counts`` are the constants above."""

    rows: list[IdRow]
    counts: Counter[str] = field(default_factory=Counter)


class ChatEncoder:
    """Encodes chats with one tokenizer, that of ``joiner``.

    The ids before a trained turn are those that ``encode_chat_prompt`` returns for the messages
    before it, and the trained ids decode to the text that follows, up to the end of the turn.
    """

    def __init__(self, joiner: Joiner) -> None:
        self.template = ChatTemplate(joiner.tokenizer)
        self.joiner = joiner
        self._reader = TurnReader(self.template)
        self._traces = Traces(self.template)

    def encode(self, example: ChatExample) -> EncodedChat:
        """Encode a chat. Raises DataError if the template rejects the messages or omits one of
        them, or if nothing is trained."""
        messages, tools = example.messages, example.tools
        if example.train_all:
            return self._whole(example)
        indices = [index for index in range(len(messages)) if example.is_trained(index)]
        if not indices:
            raise DataError("the chat has no trained turn")
        turns, rows = self._turns_and_rows(example, indices)
        if not any(turn.trained for turn in turns):
            raise DataError(
                "the chat template marks no part of the trained turns with {% generation %}: "
                "nothing to train on"
            )
        counts = _counts(turns, rows, self.template.marks(tools))
        if without_content := self._traces.check(messages, tools, turns):
            counts[IGNORED + "content"] = without_content
        if shortened := shortened_turns(messages, tools, turns, self.template):
            counts[SHORTENED] = shortened
        ignored = self._traces.ignored(messages, tools, turns)
        counts.update({IGNORED + key: count for key, count in ignored.items()})
        return EncodedChat(rows, counts)

    def _whole(self, example: ChatExample) -> EncodedChat:
        """A row of all messages, which is trained like a single turn."""
        messages, tools = example.messages, example.tools
        text = self.template.render(messages, tools).text
        chat = Turn(len(messages) - 1, "", text, ((0, len(text)),), is_whole_chat=True)
        if example.mask_reasoning:
            (chat,) = with_masked_reasoning([chat], messages, tools, self.template)
        without_content = self._traces.check(messages, tools, [chat])
        ignored = self._traces.ignored(messages, tools, [chat]) + Counter(content=without_content)
        counts = Counter({IGNORED + key: count for key, count in ignored.items()})
        return EncodedChat(turn_rows([chat], self.joiner), counts)

    def _turns_and_rows(
        self, example: ChatExample, indices: list[int]
    ) -> tuple[list[Turn], list[IdRow]]:
        turns, messages, tools = None, example.messages, example.tools
        if is_long(indices):
            turns = long_chat_turns(messages, tools, indices, self.template, self._reader)
        if turns is None:
            turns = [self._reader.read(messages, tools, index) for index in indices]
        if len(turns) > 1 and self.template.marks(tools):
            finished = self.template.render(messages[: indices[-1] + 1], tools)
            turns = [turn.marked_in(finished) for turn in turns]
        if example.mask_reasoning:
            turns = with_masked_reasoning(turns, messages, tools, self.template)
        if example.weights is not None:
            turns = [replace(turn, weight=example.weights[turn.index]) for turn in turns]
        longest = turns[-1].text
        row = None
        if all(longest.startswith(turn.text) for turn in turns):
            row = joint_row(turns, self.template, self.joiner)
        return turns, [row] if row else turn_rows(turns, self.joiner)


def _counts(turns: Sequence[Turn], rows: Sequence[IdRow], marks: bool) -> Counter[str]:
    split = len(rows) > 1
    counts = Counter(
        {
            CHATS: 1,
            TURNS: len(turns),
            DIFFERS: int(any(turn.differs for turn in turns)),
            SPLIT: int(split),
            SPLIT_ROWS: len(rows) if split else 0,
            WITHOUT_REASONING: sum(turn.without_reasoning for turn in turns),
            STRADDLES: sum(row.straddles for row in rows),
        }
    )
    if marks:
        counts[UNMARKED] = sum(not turn.trained for turn in turns)
        counts[MARKED_LATE] = sum(bool(turn.trained) and turn.trained[0][0] > 0 for turn in turns)
        counts[MARKED_EARLY] = sum(turn.marked_early for turn in turns)
    return +counts


def encode_chat(example: ChatExample, tokenizer: Any) -> EncodedChat:
    """``ChatEncoder.encode`` for one chat."""
    return ChatEncoder(Joiner(tokenizer)).encode(example)


def chat_prompt_text(messages: Sequence[Message], tokenizer: Any, tools: Tools = None) -> str:
    """The text up to the beginning of the assistant's next turn. Raises DataError if the template
    rejects the messages."""
    return ChatTemplate(tokenizer).render(messages, tools, generation_prompt=True).text


def encode_chat_prompt(
    messages: Sequence[Message], tokenizer: Any, tools: Tools = None
) -> list[int]:
    """The ids of ``chat_prompt_text``, the same as those before the turn in training."""
    text = chat_prompt_text(messages, tokenizer, tools)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def around_answer(
    messages: Sequence[Message], tokenizer: Any, tools: Tools = None
) -> tuple[str, str]:
    """Return the text that the template writes before and after a plain answer to ``messages``: up
    to the first special token, and without special tokens before the answer. Both are empty if that
    cannot be determined."""
    template = ChatTemplate(tokenizer)
    prompt = template.render(messages, tools, generation_prompt=True).text
    try:
        answered = [*messages, {"role": "assistant", "content": PROBE}]
        whole = template.render(answered, tools).text
    except DataError:  # the template does not accept a plain answer here
        return "", ""
    before, found, after = whole.removeprefix(prompt).partition(PROBE)
    if not found or not whole.startswith(prompt):
        return "", ""
    return template.special.sub("", before), template.special.split(after)[0]
