"""Render messages with a tokenizer's chat template, and analyze the template's source.

A template may mark the trained parts of the text with ``{% generation %}``.
"""

from __future__ import annotations

import operator
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

from lorakit.data.chat.tool_calls import render_calls
from lorakit.errors import DataError

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None
#: Start and end of a piece of text, in characters.
Span = tuple[int, int]

#: A content that no chat contains. Having no letters or whitespace, it is not changed by templates
#: that trim, change case or escape.
PROBE = "\u2063\u2064\u2063\u2064\u2063"
#: The keys of a message's reasoning; transformers copies it between the first two.
REASONING = ("reasoning_content", "thinking", "reasoning")
#: The keys of a turn that are rendered besides its content.
PAYLOAD = ("tool_calls", *REASONING)

#: The number of renderings that are cached, and the minimum number of messages to cache one.
_MAX_CACHED, _MIN_CACHED_MESSAGES = 8, 20

#: By source: whether the template reads contents only as lists of parts.
_PARTS: dict[str, bool] = {}


@dataclass(frozen=True)
class Rendered:
    """``marked`` are the spans of ``text`` inside ``{% generation %}`` blocks, in order."""

    text: str
    marked: tuple[Span, ...] = ()


@dataclass(frozen=True)
class _Request:
    source: str
    generation_prompt: bool
    tools: Tools
    messages: list[Message]

    def same(self, other: _Request) -> bool:
        """Whether both have identical objects; ``1 == True``, but templates distinguish them."""
        return (
            self.source == other.source
            and self.generation_prompt == other.generation_prompt
            and self.tools is other.tools
            and len(self.messages) == len(other.messages)
            and all(map(operator.is_, self.messages, other.messages))
        )


class ChatTemplate:
    """Renders messages as text, for training and for generation.

    Raises DataError if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template; hint: model.chat_template gives it one"
            )
        self.tokenizer = tokenizer
        self._recent: deque[tuple[_Request, Rendered]] = deque(maxlen=_MAX_CACHED)

    def source(self, tools: Tools = None) -> str:
        """The template's source. A tokenizer may have a different one for chats with tools."""
        try:
            return str(self.tokenizer.get_chat_template(None, tools=_listed(tools)))
        except ValueError as error:
            raise DataError(f"cannot load the tokenizer's chat template: {error}") from error

    def marks(self, tools: Tools = None) -> bool:
        """Whether the template marks the trained text with ``{% generation %}``."""
        return has_block(self.source(tools), "generation")

    def mentions(self, *keys: str) -> bool:
        """Whether the source of the template, or of any of several, contains one of the names."""
        known = self.tokenizer.chat_template
        sources = known.values() if isinstance(known, dict) else [known]
        return any(_has_word(source, key) for source in sources for key in keys)

    def render(
        self, messages: Sequence[Message], tools: Tools = None, generation_prompt: bool = False
    ) -> Rendered:
        """Render the chat. With ``generation_prompt``, the header of the assistant's next turn is
        appended, if the template has one.

        Null keys count as absent. Raises DataError with the template's error message.
        """
        if len(messages) < _MIN_CACHED_MESSAGES:
            return self._rendered(messages, tools, generation_prompt)
        request = _Request(self.source(tools), generation_prompt, tools, list(messages))
        found = next((known for asked, known in self._recent if asked.same(request)), None)
        if found is None:
            found = self._rendered(messages, tools, generation_prompt)
            self._recent.append((request, found))
        return found

    def _rendered(
        self, messages: Sequence[Message], tools: Tools, generation_prompt: bool
    ) -> Rendered:
        plain = [self._known_role(_plain(message)) for message in messages]
        if self._wants_parts(tools):
            plain = [_in_parts(message) for message in plain]
        try:
            return self._render(plain, tools, generation_prompt)
        except Exception as error:  # Jinja has its own types, and templates may raise anything
            failure = error
        if any("content" not in message for message in plain):
            for empty in (None, ""):  # what templates expect next to tool calls
                filled = [{"content": empty, **message} for message in plain]
                try:
                    return self._render(filled, tools, generation_prompt)
                except Exception as error:
                    failure = error
        raise DataError(f"the chat template {_problem(failure)}") from failure

    def _wants_parts(self, tools: Tools) -> bool:
        """Whether the template reads contents only as lists of parts, as multimodal ones do."""
        source = self.source(tools)
        if not _has_word(source, "type"):
            return False
        if source not in _PARTS:
            text, parts = ([{"role": "user", "content": content}]
                           for content in (PROBE, [{"type": "text", "text": PROBE}]))  # fmt: skip
            _PARTS[source] = not self._shows_probe(text) and self._shows_probe(parts)
        return _PARTS[source]

    def _shows_probe(self, messages: list[dict[str, Any]]) -> bool:
        try:
            return PROBE in self._render(messages, None, False).text
        except Exception:  # as above
            return False

    def _render(
        self, messages: list[dict[str, Any]], tools: Tools, generation_prompt: bool
    ) -> Rendered:
        def rendered(given: Sequence[Message]) -> Rendered:
            return self._render_as_given([dict(m) for m in given], tools, generation_prompt)

        return render_calls(rendered, messages, text_of=lambda found: found.text)

    def _render_as_given(
        self, messages: list[dict[str, Any]], tools: Tools, generation_prompt: bool
    ) -> Rendered:
        # transformers would drop nulls, and does not accept an empty chat.
        plain = all(message.get("content", "") is not None for message in messages)
        if messages and plain and not self.marks(tools):
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=_listed(tools),
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
            return Rendered(str(text))
        from transformers.utils.chat_template_utils import render_jinja_template

        listed: Any = _listed(tools)
        found: Any = render_jinja_template(
            conversations=[messages],
            tools=listed,
            chat_template=self.source(tools),
            return_assistant_tokens_mask=self.marks(tools),
            add_generation_prompt=generation_prompt,
            **self.tokenizer.special_tokens_map,
        )
        (text,), marked = found
        return Rendered(text, tuple(marked[0]) if marked else ())

    def _known_role(self, message: dict[str, Any]) -> dict[str, Any]:
        """OpenAI's developer is the system, to a template that does not know it."""
        if message.get("role") != "developer" or self.mentions("developer"):
            return message
        return {**message, "role": "system"}

    @cached_property
    def special(self) -> re.Pattern[str]:
        """A pattern for the tokenizer's special tokens, longest first."""
        added = self.tokenizer.added_tokens_decoder.values()
        names = {entry.content for entry in added if entry.special}
        return _any_of(names | set(self.tokenizer.all_special_tokens))

    @cached_property
    def added(self) -> re.Pattern[str]:
        """A pattern for all added tokens, special or not, which are split off a text first."""
        added = {entry.content for entry in self.tokenizer.added_tokens_decoder.values()}
        return _any_of(added | set(self.tokenizer.all_special_tokens))


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _any_of(names: set[str]) -> re.Pattern[str]:
    ordered = sorted(filter(str.strip, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


@cache
def _has_word(source: str, word: str) -> bool:
    return bool(re.search(rf"\b{re.escape(word)}\b", source))


def _listed(tools: Tools) -> list[dict[str, Any]] | None:
    return [dict(tool) for tool in tools] if tools else None


def _plain(message: Message) -> dict[str, Any]:
    """Remove null keys, and copy reasoning to the names that templates read, as transformers does
    from 5.24 on."""
    filled = {key: value for key, value in message.items() if value is not None}
    found = next((filled[key] for key in REASONING if key in filled), None)
    if found is None:
        return filled
    return {"thinking": found, **filled, "reasoning_content": found}


# The template's source

#: Shorter literals are considered only in comparisons, lists, calls and assignments.
_LONG_LITERAL = 3
_TRIMS = {"strip", "lstrip", "rstrip", "trim", "replace"}
_MEASURES = {"length", "count", "wordcount", "int", "float"}
#: Names whose length does not depend on a content.
_COUNTED = ("messages", "calls", "tools", "documents")


@dataclass(frozen=True)
class TemplateTests:
    """What a template may test in a message: ``literals`` that its text may contain, and ``moduli``
    of its position. ``by_equality``: the template searches for the message in a list. ``by_size``:
    it tests the size of a text, its order, or a number of two or more digits."""

    literals: tuple[str, ...] = ()
    moduli: tuple[int, ...] = ()
    by_equality: bool = False
    by_size: bool = False


@cache
def template_tests(source: str) -> TemplateTests:
    """Find the tests in a template's source, except comparisons of ``role`` with a name."""
    tokens = _tokens(source)
    if tokens is None:
        return TemplateTests()
    found = {text for text in _literals(tokens) if text}
    values = [value for _, value in tokens]
    measured = (
        values[i - 1]
        for i in range(1, len(values) - 1)
        if values[i] == "|" and values[i + 1] in _MEASURES
    )
    by_size = any(not name.endswith(_COUNTED) for name in measured) or _ordered(tokens)
    moduli = (int(b) for a, b in pairwise(values) if a == "%" and b.isdecimal() and int(b))
    return TemplateTests(
        tuple(sorted(found)),
        tuple(sorted(set(moduli))),
        any(pair == (".", "index") for pair in pairwise(values)),
        by_size,
    )


@cache
def has_block(source: str, name: str) -> bool:
    """Whether the template has a block ``{% name %}`` outside comments and raw blocks."""
    tokens = _tokens(source) or ()
    return any(
        kind == "block_begin" and value == name for (kind, _), (_, value) in pairwise(tokens)
    )


def _problem(failure: Exception) -> str:
    from jinja2 import TemplateSyntaxError

    if isinstance(failure, TemplateSyntaxError):
        return f"has a syntax error in line {failure.lineno}: {failure.message}"
    return f"rejects the messages: {failure}"


def _tokens(source: str) -> list[tuple[str, str]] | None:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        found = list(Environment().lex(source))
    except TemplateSyntaxError:
        return None
    left_out = {"whitespace", "data", "comment", "comment_begin", "comment_end"}
    return [(kind, value) for _, kind, value in found if kind not in left_out]


def _ordered(tokens: list[tuple[str, str]]) -> bool:
    """Whether a number of two or more digits is compared, or a string is compared by order."""
    for (kind, value), (other_kind, other) in pairwise(tokens):
        for a_kind, a, comparison in ((kind, value, other), (other_kind, other, value)):
            order = comparison in {"<", ">", "<=", ">="}
            if a_kind == "string" and order:
                return True
            if a_kind == "integer" and len(a) > 1 and (order or comparison in {"==", "!="}):
                return True
    return False


def _literals(tokens: list[tuple[str, str]]) -> Iterator[str]:
    padded = [("", "")] * 4 + tokens + [("", "")] * 4
    for i, (kind, value) in enumerate(padded):
        if kind != "string":
            continue
        before, after = padded[i - 1][1], padded[i + 1][1]
        text = _unescaped(value)
        if (before == "[" and after == "]") or (before == "." or after == ":"):
            continue  # a key
        compared = before in {"==", "!="} or after in {"==", "!="}
        if compared and any("role" in padded[j][1] for j in (i - 2, i - 3, i + 2)):
            continue
        called = before == "(" and padded[i - 2][1] not in _TRIMS
        tested = compared or called or before in {"in", "=", ",", "["} or after in {"in", "not"}
        if tested or len(text.strip()) >= _LONG_LITERAL:
            yield text


def _unescaped(literal: str) -> str:
    """The value of a string token, unescaped like in Jinja."""
    body = literal[1:-1]
    try:
        return body.encode("ascii", "backslashreplace").decode("unicode-escape")
    except UnicodeDecodeError:
        return body
