"""Trained turns of whose content the chat template leaves out a part."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorakit.data.chat.marking import ends_seen, marked
from lorakit.data.chat.template import PAYLOAD, ChatTemplate, Message, Tools
from lorakit.data.chat.turns import Turn, content_text
from lorakit.errors import DataError

#: What templates write anew around reasoning that they find in a content.
_TAGS = re.compile(r"</?think(?:ing)?>")


def shortened_turns(
    messages: Sequence[Message], tools: Tools, turns: Sequence[Turn], template: ChatTemplate
) -> int:
    """How many of the turns have a content that begins or ends otherwise in the text than in the
    message. The chat is rendered again only where a content does not stand in its turn."""
    left = [
        turn
        for turn in turns
        if not turn.without_reasoning
        and not _whole(content_text(messages[turn.index]), turn.answer)
    ]
    count = 0
    while left:
        last = left[-1]
        kept = _ends_kept(messages[: last.index + 1], tools, template)
        within = [turn for turn in left if last.text.startswith(turn.text)]
        for turn in within:
            ends = {2 * turn.index, 2 * turn.index + 1} & kept
            # A content that gives way to calls or reasoning as a whole is counted elsewhere.
            replaced = not ends and any(messages[turn.index].get(key) for key in PAYLOAD)
            count += len(ends) < 2 and not replaced
        done = {turn.index for turn in within}
        left = [turn for turn in left if turn.index not in done]
    return count


def _whole(content: str, answer: str) -> bool:
    """Whether the content stands in the answer, white space and tags around reasoning aside."""
    text, place = _TAGS.sub("", "".join(answer.split())), 0
    for piece in _TAGS.split("".join(content.split())):
        place = text.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def _ends_kept(messages: Sequence[Message], tools: Tools, template: ChatTemplate) -> set[int]:
    try:
        return ends_seen(template.render(marked(messages), tools).text)
    except DataError:  # the template refuses a mark: nothing can be said
        return set(range(2 * len(messages)))
