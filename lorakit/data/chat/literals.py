"""What a chat template's source compares the messages with, read from its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

#: Shorter literals count only beside a comparison, or as values of a list, a call or a variable.
_LONG_ENOUGH = 3
_TRIMS = {"strip", "lstrip", "rstrip", "trim", "replace"}
_MEASURES = {"length", "count", "wordcount", "int", "float"}
#: Names whose length says nothing of a content.
_COUNTED = ("messages", "calls", "tools", "documents")


@dataclass(frozen=True)
class TemplateTests:
    """``literals`` are the strings that a message's text may be searched for; ``moduli`` those that
    positions may be divided by. ``by_equality``: the template looks for a message among others.
    ``by_size``: it measures a text or compares its order or a number of two digits."""

    literals: tuple[str, ...] = ()
    moduli: tuple[int, ...] = ()
    by_equality: bool = False
    by_size: bool = False


@cache
def template_tests(source: str) -> TemplateTests:
    """What the template may test in a message. Role names compared with ``role`` are left out."""
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
    """Whether the template has a block ``{% name %}`` outside comments and raw text."""
    tokens = _tokens(source) or ()
    return any(
        kind == "block_begin" and value == name for (kind, _), (_, value) in pairwise(tokens)
    )


def _tokens(source: str) -> list[tuple[str, str]] | None:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        found = list(Environment().lex(source))
    except TemplateSyntaxError:
        return None
    left_out = {"whitespace", "data", "comment", "comment_begin", "comment_end"}
    return [(kind, value) for _, kind, value in found if kind not in left_out]


def _ordered(tokens: list[tuple[str, str]]) -> bool:
    """Whether a number of two digits is compared, or a string by its order."""
    for (kind, value), (other_kind, other) in pairwise(tokens):
        for a_kind, a, operator in ((kind, value, other), (other_kind, other, value)):
            order = operator in {"<", ">", "<=", ">="}
            if a_kind == "string" and order:
                return True
            if a_kind == "integer" and len(a) > 1 and (order or operator in {"==", "!="}):
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
        if tested or len(text.strip()) >= _LONG_ENOUGH:
            yield text


def _unescaped(literal: str) -> str:
    """A string token without its quotes, read as Jinja reads it."""
    body = literal[1:-1]
    try:
        return body.encode("ascii", "backslashreplace").decode("unicode-escape")
    except UnicodeDecodeError:
        return body
