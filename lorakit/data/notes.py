"""What was counted while rows were tokenised, in words: a line each."""

from __future__ import annotations

from collections.abc import Callable

from lorakit.data.chat import encode as chat
from lorakit.data.counts import Counts


def encoding_notes(counts: Counts, name: str, rows: int, max_length: int) -> list[str]:
    """The notes on the split ``name``, of ``rows`` rows of tokens: what ``max_length`` cut, and
    where a chat template or tokenizer made training differ from what a reader would expect."""
    cut = truncation_words(counts, rows, name, max_length)
    return [*([cut] if cut else []), *chat_notes(counts, name)]


def skipped_note(counts: Counts, name: str, locate: Callable[[int], str]) -> str | None:
    """Which rows were left out as bad, the first by name; None for none."""
    if not counts.skipped_rows:
        return None
    named = "; ".join(f"{locate(index)}: {reason}" for index, reason in counts.skipped)
    left = counts.skipped_rows - len(counts.skipped)
    return (
        f"{name}: {counts.skipped_rows:,} of {counts.rows:,} rows skipped (task.on_bad_row: skip): "
        f"{named}{f'; and {left:,} more' if left else ''}"
    )


def truncation_words(counts: Counts, rows: int, name: str, max_length: int) -> str | None:
    """What ``max_length`` took from the rows; None for nothing."""
    if not counts.truncated_rows:
        return None
    text = f"{name}: {counts.truncated_rows:,} of {rows:,} rows cut to {max_length} tokens"
    if counts.cut_completions:
        text += f"; {counts.cut_completions:,} lost the end of what is trained, EOS included"
    return text


def chat_notes(counts: Counts, name: str) -> list[str]:
    """What the chat template did to the chats of a split."""
    found = counts.notes
    chats, turns = f"{found[chat.CHATS]:,} chats", f"{found[chat.TURNS]:,} trained turns"
    texts = {
        chat.DIFFERS: (
            f"the chat template renders {{:,}} of {chats} differently with the answer than as the "
            "prompt before it; they are trained after the prompt as generation renders it"
        ),
        chat.SPLIT: (
            f"{{:,}} of {chats} became {found[chat.SPLIT_ROWS]:,} training rows, each trained turn "
            "in one of them: an earlier turn renders or tokenises differently once a later one "
            "follows"
        ),
        chat.STRADDLES: (
            f"in {{:,}} of {turns} the tokenizer cannot separate prompt and answer; the token "
            "across the border belongs to the answer"
        ),
        chat.WITHOUT_REASONING: (
            f"the reasoning of {{:,}} of {turns} is left out: the generation prompt already ends it"
        ),
        chat.SHORTENED: f"the chat template leaves out part of the content of {{:,}} of {turns}",
        chat.UNMARKED: (
            f"{{:,}} of {found[chat.TURNS]:,} assistant turns are not trained: the chat template "
            "does not mark them with {{% generation %}}"
        ),
        chat.MARKED_LATE: (
            f"in {{:,}} of {turns} the chat template's {{{{% generation %}}}} begins after the "
            "generation prompt; what the model has to write before it is not trained"
        ),
        chat.MARKED_EARLY: (
            f"in {{:,}} of {turns} the chat template's {{{{% generation %}}}} begins inside the "
            "generation prompt; only what follows the prompt is trained"
        ),
    }
    notes = [f"{name}: {text.format(found[key])}" for key, text in texts.items() if found[key]]
    return [*notes, *_ignored(counts, name)]


def _ignored(counts: Counts, name: str) -> list[str]:
    ignored = {
        key.removeprefix(chat.IGNORED): count
        for key, count in counts.notes.items()
        if key.startswith(chat.IGNORED)
    }
    tools = ignored.pop("tools", 0)
    notes = []
    if tools:
        notes.append(f"{name}: the chat template ignores the tools of {tools:,} chats")
    if ignored:
        keys = ", ".join(f"{key!r} ({count:,})" for key, count in sorted(ignored.items()))
        notes.append(f"{name}: the chat template ignores these keys of messages: {keys}")
    return notes
