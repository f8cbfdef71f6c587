"""Which turns of a chat a template has to render alike."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from lorakit.data.chat.literals import TemplateTests, template_tests
from lorakit.data.chat.template import PAYLOAD, REASONING, ChatTemplate, Message, Span, Tools
from lorakit.data.chat.turns import content_text

_NUMBER = re.compile("[0-9]+")

#: Equal for turns of one kind.
Kind = tuple[Hashable, ...]
#: What a template can see of one message.
_Features = frozenset[tuple[Hashable, ...]]
#: Of literals that were seen earlier in the chat only longer ones count.
_LONG_ENOUGH = 3


@dataclass
class TurnKinds:
    """``places`` are those of the contents of ``messages`` in ``text``, the whole chat's."""

    messages: Sequence[Message]
    text: str
    places: Sequence[Span | None]
    template: ChatTemplate

    def tell(self, tools: Tools) -> bool:
        """Learn the kinds. False where the template may tell turns apart in a way not seen here."""
        tests = template_tests(self.template.source(tools))
        if tests.by_size:
            return False
        roles = {message["role"] for message in self.messages}
        literals = [text for text in tests.literals if text not in roles]
        tests = replace(tests, literals=tuple(literals))
        self._tests = tests
        self._features = [self._of_message(message, tests) for message in self.messages]
        self._before = list(self._earlier(literals))
        return True

    def kind(self, index: int) -> Kind:
        """Of message ``index``, a turn of the assistant's."""
        messages, features = self.messages, self._features
        before = messages[index - 1]["role"] if index else None
        after = messages[index + 1]["role"] if index + 1 < len(messages) else None
        asked = next((i for i in range(index - 1, -1, -1) if messages[i]["role"] == "user"), None)
        return (
            before,
            after,
            features[index],
            features[index - 1] if index else None,
            features[asked] if asked is not None else None,
            self._before[index],
            self._lead(index),
            tuple(index % number for number in self._tests.moduli),
            self._tests.by_equality and self._repeats(index - 1),
            self._tests.by_equality and self._repeats(asked),
        )

    def _repeats(self, index: int | None) -> bool:
        """Whether an earlier message is the same as message ``index``."""
        return bool(index and index > 0 and self.messages[index] in self.messages[:index])

    def _of_message(self, message: Message, tests: TemplateTests) -> _Features:
        return frozenset(self._seen(message, tests))

    def _seen(self, message: Message, tests: TemplateTests) -> Iterator[tuple[Hashable, ...]]:
        for key, value in message.items():
            known = key == "content" or key in PAYLOAD or self.template.mentions(key)
            if key == "role" or value is None or not known:
                continue
            if isinstance(value, bool | int | float):
                yield key, value
                continue
            text = _text_of(message, key)
            if text.strip() and value:
                yield (key,)
            for literal in tests.literals:
                if literal in text:
                    yield key, literal, text.startswith(literal), text.endswith(literal)

    def _earlier(self, literals: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """Before each message: the literals that an earlier one has, the one seen last first."""
        last: dict[str, int] = {}
        for index, message in enumerate(self.messages):
            yield tuple(sorted(last, key=lambda text: (-last[text], text)))
            texts = [_text_of(message, key) for key in message if key != "role"]
            for literal in literals:
                if len(literal) >= _LONG_ENOUGH and any(literal in text for text in texts):
                    last[literal] = index

    def _lead(self, index: int) -> str | None:
        """What the template writes between the content of the message before a turn and the turn's
        own, its reasoning and its numbers aside; None where one of the two is not there whole."""
        place, before = self.places[index], self.places[index - 1] if index else (0, 0)
        if place is None or before is None:
            return None
        lead = self.text[before[1] : place[0]]
        message = self.messages[index]
        for key in REASONING:
            if reasoning := _text_of(message, key).strip():
                lead = lead.replace(reasoning, "")
        return _NUMBER.sub("0", lead)


def _text_of(message: Message, key: str) -> str:
    value = message.get(key)
    if key == "content":
        return content_text(message)
    return value if isinstance(value, str) else repr(value) if value else ""
