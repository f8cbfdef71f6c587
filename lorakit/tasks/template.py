"""Text with ``{column}`` in it: a row's columns by name, and nothing that runs.

``{{`` and ``}}`` are braces. What stands between braces is the whole name of a column: attributes,
indices and formats, as ``str.format`` has them, are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

from pydantic import AfterValidator

from lorakit.errors import DataError, shown
from lorakit.recipe.faults import did_you_mean
from lorakit.recipe.sections import Text

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


@lru_cache(maxsize=64)
def _pieces(template: str) -> tuple[tuple[str, bool], ...]:
    """Text or column, and whether it is a column. Raises ValueError for a brace without its mate
    and for empty braces."""
    pieces = []
    for match in _PIECE.finditer(template):
        text, column = match.group(), match.group(1)
        if column is not None:
            if not column.strip():
                raise ValueError("a column's name is missing in {}; {{}} are plain braces")
            pieces.append((column, True))
        elif text in ("{", "}"):
            raise ValueError(f"a single {text!r}; {text * 2!r} is a plain brace")
        else:
            pieces.append((text[:1] if text in ("{{", "}}") else text, False))
    return tuple(pieces)


def _checked(template: str) -> str:
    _pieces(template)
    return template


#: A template as a recipe's value.
TemplateText = Annotated[Text, AfterValidator(_checked)]


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that stand in it, each once."""
    return tuple(dict.fromkeys(text for text, is_column in _pieces(template) if is_column))


def check_columns(template: str, key: str, columns: Sequence[str]) -> None:
    """Raise DataError, with the nearest there is, for a name that no column has."""
    for name in template_columns(template):
        if name not in columns:
            message = did_you_mean(f"{key}: no column {name!r}", name, columns)
            if re.search(r"[.\[!:]", name):
                message += "; braces hold a column's whole name, no attribute, index or format"
            raise DataError(f"{message}; the columns are {', '.join(map(repr, columns))}")


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The text with the row's values; a number is written as Python writes it, and a missing or
    null one is empty. Raises DataError for a value that is neither text nor number."""
    return "".join(
        _text(text, row.get(text)) if is_column else text for text, is_column in _pieces(template)
    )


def _text(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        f"column {column!r} holds {shown(value)}; allowed in a template: text or a number"
    )
