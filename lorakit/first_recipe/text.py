"""Write the sections of a recipe as YAML with comments."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.errors import printable
from lorakit.recipe.export import yaml_text

_WIDTH = 100
#: The schema that a recipe's first line names, beside the recipe.
SCHEMA = "recipe.schema.json"

#: Section -> its keys and the comments of some of them.
Sections = Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]]


def commented(sections: Sections, introduction: Sequence[str]) -> str:
    """The recipe as YAML text. A comment stands above its key, the lines of ``introduction`` at the
    top."""
    lines = [f"# yaml-language-server: $schema={SCHEMA}"]
    lines += [f"# {_on_one_line(line)}" for line in introduction]
    for section, (keys, comments) in sections.items():
        lines.append(f"{section}:")
        for key, value in keys.items():
            lines += _comment(comments.get(key, ""), 2)
            lines += [f"  {line}" for line in _entry(key, value)]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: int) -> list[str]:
    start = " " * indent + "# "
    plain = _on_one_line(text)
    return textwrap.wrap(plain, _WIDTH, initial_indent=start, subsequent_indent=start)


def _on_one_line(text: str) -> str:
    """Names in the data must neither end a comment nor control a terminal."""
    return printable("".join(" " if c.isspace() else c for c in text))


def _entry(key: str, value: Any) -> list[str]:
    """``KEY: VALUE``, on one line unless it is a list of quoted texts."""
    if isinstance(value, float) and 0 < value < 0.01:
        return [f"{key}: {value:.1e}".replace("e-0", "e-")]
    text = yaml_text({key: value}).rstrip("\n")
    return [text[1:-1]] if text.startswith("{") else text.splitlines()
