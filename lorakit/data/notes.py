"""What the user is told about tokenized rows: what was truncated, skipped or ignored."""

from __future__ import annotations

from collections.abc import Callable

from lorakit.data.chat import encode as chat
from lorakit.data.counts import DOCUMENT_PARTS, SPLIT_DOCUMENTS, Counts
from lorakit.data.encode import EncodedSplit
from lorakit.data.sources import Split


def split_notes(encoded: EncodedSplit, split: Split, max_length: int) -> list[str]:
    """Return notes for the user on how ``split`` was tokenized."""
    skipped = skipped_note(encoded.counts, split.name, split.locate)
    notes = encoding_notes(encoded.counts, split.name, len(encoded), max_length)
    return [*([skipped] if skipped else []), *notes]


def encoding_notes(counts: Counts, name: str, rows: int, max_length: int) -> list[str]:
    """Return notes on the split ``name`` with ``rows`` rows of tokens: what was truncated to
    ``max_length``, and what the chat template or tokenizer changed."""
    cut = _truncation_note(counts, rows, name, max_length)
    parts = _split_note(counts, name, max_length)
    return [*filter(None, (cut, parts)), *chat_notes(counts, name)]


def skipped_note(counts: Counts, name: str, locate: Callable[[int], str]) -> str | None:
    """Describe the skipped rows, naming the first ones; None if there are none."""
    if not counts.skipped_rows:
        return None
    named = "; ".join(f"{locate(index)}: {reason}" for index, reason in counts.skipped)
    left = counts.skipped_rows - len(counts.skipped)
    return (
        f"{name}: {counts.skipped_rows:,} of {counts.rows:,} rows skipped (task.on_bad_row: skip): "
        f"{named}{f'; and {left:,} more' if left else ''}"
    )


def _truncation_note(counts: Counts, rows: int, name: str, max_length: int) -> str | None:
    if not counts.truncated_rows:
        return None
    text = (
        f"{name}: {counts.truncated_rows:,} of {rows:,} rows truncated to {max_length} tokens; "
        f"{lost_tokens(counts)} lost"
    )
    if counts.cut_completions:
        text += f"; {counts.cut_completions:,} lost the end of the trained text, including EOS"
    return text


def lost_tokens(counts: Counts) -> str:
    """Describe the number of tokens that truncation removed."""
    share = counts.lost_tokens / (counts.tokens + counts.lost_tokens)
    return f"{counts.lost_tokens:,} tokens ({share:.1%} of all)"


def _split_note(counts: Counts, name: str, max_length: int) -> str | None:
    if not counts.notes[SPLIT_DOCUMENTS]:
        return None
    return (
        f"{name}: {counts.notes[SPLIT_DOCUMENTS]:,} of {counts.rows:,} documents are longer than "
        f"{max_length} tokens and became {counts.notes[DOCUMENT_PARTS]:,} rows"
    )


def chat_notes(counts: Counts, name: str) -> list[str]:
    """Describe what the chat template changed in the chats of a split."""
    found = counts.notes
    chats, turns = f"{found[chat.CHATS]:,} chats", f"{found[chat.TURNS]:,} trained turns"
    texts = {
        chat.DIFFERS: (
            f"in {{:,}} of {chats} the chat template renders the messages before an answer "
            "differently once the answer follows; training uses the prompt as generation renders it"
        ),
        chat.SPLIT: (
            f"{{:,}} of {chats} became {found[chat.SPLIT_ROWS]:,} training rows, with each trained "
            "turn in one of them: an earlier turn renders or tokenizes differently once a later "
            "one follows"
        ),
        chat.STRADDLES: (
            f"in {{:,}} of {turns} the tokenizer cannot separate prompt and answer; the token "
            "across the boundary counts as part of the answer"
        ),
        chat.WITHOUT_REASONING: (
            f"the reasoning of {{:,}} of {turns} is dropped: the generation prompt already closes "
            "it"
        ),
        chat.SHORTENED: f"the chat template drops part of the content of {{:,}} of {turns}",
        chat.UNMARKED: (
            f"{{:,}} of {found[chat.TURNS]:,} assistant turns are not trained: the chat template "
            "does not mark them with {{% generation %}}"
        ),
        chat.MARKED_LATE: (
            f"in {{:,}} of {turns} the chat template's {{{{% generation %}}}} begins after the "
            "generation prompt; the text between them is not trained, but must be generated"
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


def endless_warning(split: str, endless: int, rows: int) -> str:
    """Return the warning about rows whose answer does not end in a token that ends a generation."""
    return (
        f"warning: {split}: {endless:,} of {rows:,} rows do not end in a trained EOS: they do not "
        "teach the model to stop"
    )
