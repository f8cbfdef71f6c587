"""Plain scalars as YAML 1.2's core schema reads them: ``2e-4`` is a number, ``no`` is a text."""

from __future__ import annotations

import re

Scalar = str | int | float | bool | None

_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
#: Longer ones cannot be meant, and Python refuses to convert them.
_MAX_DIGITS = 400
_INTEGER = re.compile(rf"[-+]?[0-9]{{1,{_MAX_DIGITS}}}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NANS = frozenset({".nan", ".NaN", ".NAN"})


def read_scalar(text: str) -> Scalar:
    """The value of an unquoted scalar.

    Integers are decimal only (``0x1F`` stays a text); of the booleans only ``true`` and ``false``
    count (``yes``, ``no``, ``on``, ``off`` stay texts).
    Source: YAML 1.2.2, section 10.3, the core schema without octal and hexadecimal integers.
    """
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and len(text) <= _MAX_DIGITS:
        return float(text)
    if _INFINITY.fullmatch(text) or text in _NANS:
        return float(text.replace(".", ""))
    return text
