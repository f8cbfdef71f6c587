"""Building HTML in which everything but the markup itself is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from lorakit.errors import printable

#: Elements without an end tag.
_VOID = frozenset({"br", "hr", "input", "link", "meta"})


class Html(str):
    """Markup; any other string is text."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | bool | None) -> Html:
    """An element with the ``children``, which are escaped unless they are Html.

    An attribute's name may end in ``_`` (``class_``), and its ``_`` stand for ``-``. One that is
    True has no value, one that is False or None is left out.
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escaped(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Html:
    return Html("".join(part if isinstance(part, Html) else escaped(part) for part in parts))


def escaped(text: str) -> str:
    """``text`` for the inside of an element or of an attribute's quotes; characters that control
    how text is displayed are shown as their codes."""
    return html.escape(printable(text), quote=True)


def table(
    titles: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    label: str,
    numbers: bool = True,
) -> Html:
    """A table whose first column names its rows; the others are numbers, or else text."""
    head = element("tr", *(element("th", title, scope="col") for title in titles))
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
        for first, *rest in rows
    ]
    name = "numbers" if numbers else "texts"
    return scrolled(
        element("table", element("thead", head), element("tbody", *body), class_=name), label
    )


def scrolled(contents: Html, label: str) -> Html:
    """A region, called ``label``, that scrolls where its contents are wider or longer."""
    return element("div", contents, class_="scroll", tabindex="0", role="region", aria_label=label)


def embedded_json(value: Any) -> Html:
    """``value`` as JSON inside a script element, which no text in it can end."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(text)
