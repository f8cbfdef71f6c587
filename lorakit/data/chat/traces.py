"""Find out which messages, keys, tools and parts of contents a chat template ignores."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lorakit.data.chat.template import PAYLOAD, PROBE, REASONING, ChatTemplate, Message, Tools
from lorakit.data.chat.turns import Turn, content_text, ends_seen, marked, seen, with_content
from lorakit.errors import DataError

#: The number of chats in which to look for the effect of a key that the template mentions.
_MAX_CHATS = 20
_READ = -1
#: Tags that templates rewrite around the reasoning in a content.
_TAGS = re.compile(r"</?think(?:ing)?>")


@dataclass
class Traces:
    """Searches the trained text for the parts of each message, and renders the chat again only for
    those not found."""

    template: ChatTemplate
    _known: set[tuple[object, ...]] = field(default_factory=set)
    _without_effect: Counter[tuple[str, str]] = field(default_factory=Counter)

    def check(self, messages: Sequence[Message], tools: Tools, turns: Sequence[Turn]) -> int:
        """Count the messages, up to the last of ``turns``, whose content is ignored although their
        tool calls or reasoning are not.

        Raises DataError for a message that is ignored completely.
        """
        last, without_content = turns[-1], 0
        found = self._present(messages, tools, turns)
        for index in range(last.index + 1):
            message = messages[index]
            parts = [key for key in ("content", *PAYLOAD) if _filled(message, key)]
            if index in found or not parts:
                continue
            emptied = self._emptied(message)
            if not self._changes(messages, tools, turns, {index: emptied}):
                names = " and ".join("tool calls" if key == "tool_calls" else key for key in parts)
                raise DataError(
                    f"message {index + 1}: the chat template omits this {message['role']} message "
                    f"(its {names}); hint: model.chat_template: FILE, a template that renders it"
                )
            if "content" in parts and len(parts) > 1:
                other = {index: with_content(message, PROBE)}
                without_content += not self._changes(messages, tools, turns, other)
        return without_content

    def ignored(
        self, messages: Sequence[Message], tools: Tools, turns: Sequence[Turn]
    ) -> Counter[str]:
        """Count, by key, the messages with a key other than role and content that has no effect on
        the text. ``tools`` counts as 1 if it has no effect."""
        found: Counter[str] = Counter()
        if tools and self._is_ignored("tools", "", messages, tools, turns, {}):
            found["tools"] = 1
        having: dict[tuple[str, str], list[int]] = {}
        for index, message in enumerate(messages[: turns[-1].index + 1]):
            for key in message.keys() - {"role", "content"}:
                if _filled(message, key):
                    having.setdefault((key, message["role"]), []).append(index)
        for (key, role), indices in sorted(having.items()):
            without = _without(messages, indices, key)
            if self._is_ignored(key, role, messages, tools, turns, without):
                found[key] += len(indices)
            elif key in PAYLOAD:
                found[key] += self._silent(key, indices, messages, tools, turns)
        return +found

    def _silent(
        self,
        key: str,
        indices: Sequence[int],
        messages: Sequence[Message],
        tools: Tools,
        turns: Sequence[Turn],
    ) -> int:
        """Count the messages ``indices`` in which a key that the template reads has no effect."""
        silent = [index for index in indices if not self._shows(messages[index], index, key, turns)]
        if not silent or self._changes(messages, tools, turns, _without(messages, silent, key)):
            return 0
        return len(silent)

    def _present(
        self, messages: Sequence[Message], tools: Tools, turns: Sequence[Turn]
    ) -> set[int]:
        """The messages of which a part is found in the text of the last turn. Contents are searched
        for in order; in the first chat with a given set of pairs of roles, they are also marked."""
        last = turns[-1]
        counted = messages[: last.index + 1]
        contents = {index: text for index, message in enumerate(counted)
                    if (text := content_text(message).strip())}  # fmt: skip
        found, end = set(), 0
        for index, content in contents.items():
            if (place := last.text.find(content, end)) >= 0:
                found.add(index)
                end = place + len(content)
        roles = [message["role"] for message in counted]
        kind = (bool(tools), roles[0], roles[-1], frozenset(pairwise(roles)))
        if kind not in self._known or found != contents.keys():
            wanted = set(contents)
            found = wanted & {last.index} if contents.get(last.index, "") in last.answer else set()
            found |= self._marked(counted, tools, wanted - found)
            if found >= wanted:
                self._known.add(kind)
        silent = (index for index in range(len(counted)) if index not in contents)
        return found | {i for i in silent if self._shows_any(messages[i], i, turns)}

    def _marked(self, messages: Sequence[Message], tools: Tools, wanted: set[int]) -> set[int]:
        """Those of the messages ``wanted`` whose marks are found in the prompt of the last message,
        or in the chat with it."""
        changed = marked(messages)
        found: set[int] = set()
        if len(changed) > 1:
            found |= seen(self._text(changed[:-1], tools, True))
        if not found >= wanted:
            found |= seen(self._text(changed, tools, False))
        return found & wanted

    def _shows_any(self, message: Message, index: int, turns: Sequence[Turn]) -> bool:
        return any(
            _filled(message, key) and self._shows(message, index, key, turns) for key in PAYLOAD
        )

    def _shows(self, message: Message, index: int, key: str, turns: Sequence[Turn]) -> bool:
        """Whether the template mentions the key, and its value occurs in the text of the message's
        turn or of the last one."""
        if not self._mentions(key):
            return False
        values = [*(_names(message[key]) if key == "tool_calls" else _leaves(message[key]))]
        turn_text = next((turn.text for turn in turns if turn.index == index), "")
        return any(value in turn_text or value in turns[-1].text for value in values)

    def _is_ignored(
        self,
        key: str,
        role: str,
        messages: Sequence[Message],
        tools: Tools,
        turns: Sequence[Turn],
        changed: Mapping[int, Message],
    ) -> bool:
        """Whether removing the key from all messages of ``role``, as in ``changed``, has no effect.

        A key that had an effect once counts as read. One that had none is tried in more chats if
        the template mentions it.
        """
        seen_before = self._without_effect[key, role]
        if seen_before == _READ:
            return False
        most = _MAX_CHATS if self._mentions(key) else 1
        if seen_before < most:
            if self._changes(messages, tools, turns, changed, without_tools=key == "tools"):
                self._without_effect[key, role] = _READ
                return False
            self._without_effect[key, role] += 1
        return True

    def _mentions(self, key: str) -> bool:
        return self.template.mentions(*(REASONING if key in REASONING else (key,)))

    def _changes(
        self,
        messages: Sequence[Message],
        tools: Tools,
        turns: Sequence[Turn],
        changed: Mapping[int, Message],
        without_tools: bool = False,
    ) -> bool:
        """Whether replacing messages changes a text that is trained on: that of the last turn, of
        the first turn after the change, or of the changed turn."""
        others = [changed.get(index, message) for index, message in enumerate(messages)]
        given = None if without_tools else tools
        first = min(changed, default=0)
        following = [turn for turn in turns if turn.index >= first][:1]
        for turn in {turn.index: turn for turn in (*following, turns[-1])}.values():
            end = turn.index
            if turn.is_whole_chat:
                return self._text(others[: end + 1], given, False) != turn.text
            before = end > 0 and (without_tools or first < end)
            if before and self._text(others[:end], given, True) != turn.prompt:
                return True
            if end in changed or self.template.marks(tools):
                finished = self._finished(messages[: end + 1], tools)
                if self._finished(others[: end + 1], given) != finished:
                    return True
        return False

    def _text(self, messages: Sequence[Message], tools: Tools, generation: bool) -> str:
        try:
            return self.template.render(messages, tools, generation).text
        except DataError as error:  # the template reads what was changed
            return str(error)

    def _finished(self, messages: Sequence[Message], tools: Tools) -> object:
        """The rendered chat with its marks, or the template's error."""
        try:
            return self.template.render(messages, tools)
        except DataError as error:
            return str(error)

    def _emptied(self, message: Message) -> Message:
        """The message with its content replaced, if any, and without tool calls and reasoning."""
        bare = {key: value for key, value in message.items() if key not in PAYLOAD}
        return with_content(bare, PROBE) if _filled(message, "content") else bare


def _filled(message: Message, key: str) -> bool:
    if key == "content":
        return bool(content_text(message).strip())
    return message.get(key) not in (None, "", [], {})


def _without(messages: Sequence[Message], indices: Sequence[int], key: str) -> dict[int, Message]:
    dropped = REASONING if key in REASONING else (key,)
    return {
        index: {k: value for k, value in messages[index].items() if k not in dropped}
        for index in indices
    }


def _leaves(value: Any) -> Iterator[str]:
    """Yield the non-blank texts in a value, at any depth, stripped."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str) and value.strip():
        yield value.strip()


def _names(functions: Any) -> Iterator[str]:
    """Yield the names of functions: ``{"type": "function", "function": {"name": ...}}``."""
    for entry in functions if isinstance(functions, list | tuple) else ():
        function = entry.get("function", entry) if isinstance(entry, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str):
            yield name


def shortened_turns(
    messages: Sequence[Message], tools: Tools, turns: Sequence[Turn], template: ChatTemplate
) -> int:
    """Count the turns of whose content the beginning or end is missing in the text. The chat is
    rendered again only if a content is not found in its turn."""
    left = [
        turn
        for turn in turns
        if not turn.without_reasoning
        and not _contains(content_text(messages[turn.index]), turn.answer)
    ]
    count = 0
    while left:
        last = left[-1]
        kept = _ends_kept(messages[: last.index + 1], tools, template)
        within = [turn for turn in left if last.text.startswith(turn.text)]
        for turn in within:
            ends = {2 * turn.index, 2 * turn.index + 1} & kept
            # A content that calls or reasoning replace completely is counted elsewhere.
            replaced = not ends and any(messages[turn.index].get(key) for key in PAYLOAD)
            count += len(ends) < 2 and not replaced
        done = {turn.index for turn in within}
        left = [turn for turn in left if turn.index not in done]
    return count


def _contains(content: str, answer: str) -> bool:
    """Whether the answer contains the content, ignoring whitespace and reasoning tags."""
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
    except DataError:  # the template rejects a mark: assume that nothing is missing
        return set(range(2 * len(messages)))


def ignored_in_prompt(messages: Sequence[Message], tools: Tools, tokenizer: Any) -> Counter[str]:
    """Count the keys, and ``tools``, that have no effect on the prompt.

    Raises DataError for a message that the template omits.
    """
    template = ChatTemplate(tokenizer)
    prompt = template.render(messages, tools, generation_prompt=True).text
    answer = Turn(len(messages), prompt, "", ())
    traces = Traces(template)
    asked = [*messages, {"role": "assistant"}]
    without_content = traces.check(asked, tools, [answer])
    return traces.ignored(asked, tools, [answer]) + Counter(content=without_content)
